"""docs/sdxl.md: its commands run on a small SDXL model, and its estimates are those that a run prints.

The Chinese page has the same commands and numbers (test_sister_pages.py).
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from user_pages import blocks, read_page

from library.generation import session
from library.generation.options import parse_options as parse_generate_options
from library.models.saving import save_stable_diffusion
from library.testing import full_size_header, small_sdxl
from library.tools import merge_program
from library.training import entry
from library.training.checks.estimates import estimated_bytes
from library.training.options import parse_options

PAGE = read_page("docs/sdxl.md")
COMMANDS = [content.strip() for language, content in blocks(PAGE) if language == "bash"]
TRAINING = [command for command in COMMANDS if "sdxl_train_network.py" in command]
SMALL = ["--max_train_steps=1", "--max_train_epochs=1", "--mixed_precision=no", "--max_data_loader_n_workers=0"]
SMALL_DATA = {
    "resolution = 1024": "resolution = 64",
    "min_bucket_reso = 512": "min_bucket_reso = 64",
    "num_repeats = 10": "num_repeats = 1",
}
ROWS = re.findall(r"^\| (\d+) GB \| (\d+), (\d+) \| (yes|no) \| `?(\w+)`? \| ([\d.]+) GiB \|$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl_page")
    model = small_sdxl(unet_channels=(32, 32, 32), vae_channels=(32, 32, 32, 32))
    save_stable_diffusion(model, folder / "sdxl.safetensors")
    (folder / "images" / "cat").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "images" / "cat" / "a.png")
    data = next(content for language, content in blocks(PAGE) if language == "toml")
    for large, small in SMALL_DATA.items():
        assert large in data
        data = data.replace(large, small)
    (folder / "data.toml").write_text(data, encoding="utf-8")
    return folder


def test_the_commands_run_one_after_the_other(work_folder, monkeypatch):
    monkeypatch.chdir(work_folder)
    for command in TRAINING:
        AcceleratorState._reset_state(reset_partial_state=True)
        words = shlex.split(command.split("sdxl_train_network.py")[1])
        parse_options(words)  # as it stands
        options = parse_options([*words, *SMALL])
        assert entry.train(options) == 0
        with safe_open(Path("out") / f"{options.output.output_name}.safetensors", "pt") as file:
            assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
    (draw,) = (command for command in COMMANDS if "sdxl_gen_img.py" in command)
    words = [word for word in shlex.split(draw)[2:] if word != "--bf16" or torch.cuda.is_available()]
    options = parse_generate_options([*words, "--steps=1", "--W=64", "--H=64", "--no_preview", "--outdir=drawn"])
    assert session.run(options) == 0 and list(Path("drawn").glob("*.png"))
    (merge,) = (command for command in COMMANDS if "sdxl_merge_lora.py" in command)
    merge_program.main(shlex.split(merge)[2:])
    assert Path("merged.safetensors").stat().st_size > 0
    assert len(COMMANDS) == len(TRAINING) + 2


@pytest.mark.parametrize("card, rank, batch, checkpointing, packed, estimate", ROWS)
def test_the_estimates_are_the_programs_and_fit_the_card(card, rank, batch, checkpointing, packed, estimate):
    words = [*shlex.split(TRAINING[0].split("sdxl_train_network.py")[1]), f"--network_dim={rank}"]
    words = [word for word in words if word != "--gradient_checkpointing"]
    words += ["--gradient_checkpointing"] * (checkpointing == "yes") + [f"--base_dtype={packed}"] * (packed != "none")
    needed = estimated_bytes(parse_options(words), full_size_header("sdxl"), int(batch), (1024, 1024))
    assert f"{needed / 2**30:.1f}" == estimate and needed < 0.9 * int(card) * 10**9


def test_every_size_of_card_is_there():
    assert [row[0] for row in ROWS] == ["8", "12", "16", "24", "24"]
