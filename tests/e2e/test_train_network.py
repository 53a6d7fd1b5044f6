"""train_network.py as a program: exit codes, one-line errors, Ctrl-C, and the command that everybody types."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from library.models.saving import save_stable_diffusion
from library.testing import small_stable_diffusion

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "train_network.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a space and an umlaut in its name, with model.safetensors, images and data.toml."""
    folder = tmp_path_factory.mktemp("größe und platz")
    save_stable_diffusion(small_stable_diffusion(vae_channels=(32, 32, 32, 32)), folder / "model.safetensors")
    (folder / "bilder").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / "bilder" / f"bild ä {number}.png")
    (folder / "data.toml").write_text(
        '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "bilder"\nclass_tokens = "a square"\n', encoding="utf-8"
    )
    return folder


def command(*words: str) -> list[str]:
    return [
        sys.executable, SCRIPT, "--pretrained_model_name_or_path=model.safetensors", "--dataset_config=data.toml",
        "--output_dir=out", "--network_module=networks.lora", "--learning_rate=1e-4", *words,
    ]  # fmt: skip


def test_the_command_as_people_type_it(folder):
    words = (
        (
            f"accelerate launch --num_cpu_threads_per_process 1 {SCRIPT} --pretrained_model_name_or_path=model.safetensors "
            "--dataset_config=data.toml --output_dir=out --output_name=mine --save_model_as=safetensors --prior_loss_weight=1.0 "
            "--max_train_steps=4 --learning_rate=1e-4 --optimizer_type=AdamW8bit --xformers --mixed_precision=no --cache_latents "
            "--gradient_checkpointing --save_every_n_epochs=1 --network_module=networks.lora"
        )
        .replace(f"{SCRIPT}", "SCRIPT")
        .split()
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *(SCRIPT if word == "SCRIPT" else word for word in words[2:])]
    done = subprocess.run(launcher, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    with safe_open(folder / "out" / "mine.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == "4" and file.metadata()["ss_optimizer"] == "bitsandbytes.optim.adamw.AdamW8bit"
    assert {path.name for path in (folder / "out").iterdir()} >= {"mine.safetensors", "mine-000001.safetensors", "mine-loss.png"}
    for words in ("mine.safetensors", "mine-loss.png", "s a step", "peak memory", "loss"):
        assert words in done.stdout
    assert "Warning" not in done.stderr.replace("bf16", ""), done.stderr


@pytest.mark.parametrize(
    "words, part",
    [
        (["--netwrk_dim=4"], "--network_dim"),  # found before anything is imported
        (["--network_module=network.lora"], "networks.lora"),  # found by the checks before a run
    ],
)
def test_wrong_input_ends_in_one_line_and_exit_code_2(folder, words, part):
    done = subprocess.run(command(*words), cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=200)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and part in last
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_saves_and_says_how_to_go_on(folder):
    run = subprocess.Popen(
        command("--output_name=stopped", "--max_train_steps=100000", "--max_data_loader_n_workers=2", "--save_every_n_steps=1",
                "--save_last_n_steps=1"),
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: list((folder / "out").glob("stopped-step*")), run)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the loader's processes too
        output, _ = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 130, output
    saved = sorted((folder / "out").glob("stopped-step*.safetensors"))[-1]
    assert saved.name in output and "--network_weights=" in output and "Traceback" not in output
    with safe_open(saved, "pt") as file:
        assert int(file.metadata()["ss_steps"]) == int(saved.stem.removeprefix("stopped-step"))


def wait_for(happened, run: subprocess.Popen, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert run.poll() is None and time.monotonic() < end, "the run ended or took too long"
        time.sleep(0.2)
