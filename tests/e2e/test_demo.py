"""The demo, with few steps: its files, its sheet, and the command that it prints."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
FILES = ("lineart.safetensors", "lineart-loss.png", "contact-sheet.png")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder of the results, what the demo printed), from a demo that was started in another folder."""
    folder = tmp_path_factory.mktemp("demo with spaces é") / "out"
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--steps", "2", "--images", "2", "--output", str(folder)]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    result = subprocess.run(command, cwd=folder.parent, capture_output=True, encoding="utf-8", env=environment, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


@pytest.mark.slow
def test_demo_writes_lora_sheet_and_plot_and_names_them(demo):
    folder, printed = demo
    for name in FILES:
        assert (folder / name).stat().st_size > 0
        assert str(folder / name) in printed
    assert (folder / "lineart.html").stat().st_size > 0
    assert f"{folder / 'lineart.html'} (open it in a browser)" in printed


@pytest.mark.slow
def test_lora_is_trained_and_whole(demo):
    with safe_open(demo[0] / "lineart.safetensors", "pt") as file:
        ups = [file.get_tensor(name) for name in file.keys() if name.endswith("lora_up.weight")]
        assert file.metadata()["ss_steps"] == "2"
    assert ups and all(up.isfinite().all() for up in ups)
    assert any(up.abs().max() > 0 for up in ups)  # they start at zero


@pytest.mark.slow
def test_sheet_has_a_row_a_prompt_and_three_columns(demo):
    with Image.open(demo[0] / "contact-sheet.png") as sheet:
        assert sheet.width > 3 * 128 and 2 * 128 < sheet.height < 3 * 128
        assert len(sheet.convert("RGB").getcolors(sheet.width * sheet.height)) > 1000  # images, not an empty grid


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="printed for PowerShell there")
def test_printed_command_runs_again(demo, tmp_path):
    folder, printed = demo
    typed = printed[printed.index("accelerate launch") :].replace("\\\n", " ")
    words = shlex.split(typed)
    assert words[:2] == ["accelerate", "launch"] and "train_network.py" in words
    other = [f"--output_dir={tmp_path}" if word == f"--output_dir={folder}" else word for word in words[2:]]
    assert other != words[2:]
    command = [sys.executable, "-m", "accelerate.commands.launch", *other]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "lineart.safetensors").stat().st_size > 0
