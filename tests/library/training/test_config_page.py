"""docs/config_README.md: its files are read, its commands run, and its messages are those of the program."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train_network
from library.data.config import datasets_from_file
from library.data.config_keys import DatasetDefaults
from library.errors import UserError
from library.training.options import parse_options

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "config_README.md").read_text(encoding="utf-8")
TRAIN, IMAGES = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
TRAINING, FROM_METADATA, DOCTOR = re.findall(r"```bash\n(.*?)\n```", PAGE)


@pytest.fixture(autouse=True)
def work_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.toml").write_text(TRAIN, encoding="utf-8")
    Path("images.toml").write_text(IMAGES, encoding="utf-8")
    for folder in (Path("images/cat"), Path("10_sks cat")):
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "a.png")


def test_the_files_are_read_and_the_command_line_wins():
    options = parse_options(shlex.split(TRAINING)[2:])
    assert options.optimizer.learning_rate == 2e-4 and options.network.network_args == ["conv_dim=8", "conv_alpha=4"]
    (dataset,) = datasets_from_file(Path(options.data.dataset_config), DatasetDefaults())
    assert dataset.batch_size == 2 and dataset.subsets[0].num_repeats == 10 and dataset.subsets[0].shuffle_caption


def test_from_metadata_prints_a_command_and_a_dataset_file_that_are_understood(monkeypatch, capsys):
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": "16", "ss_network_alpha": "8.0", "ss_learning_rate": "0.0002",
        "ss_network_args": '{"conv_dim": "8"}', "ss_optimizer": "torch.optim.adamw.AdamW(betas=(0.9, 0.99))", "ss_seed": "7",
        "ss_output_name": "mine", "ss_sd_model_name": "model.safetensors", "ss_cache_latents": "True", "ss_unet_lr": "None",
        "ss_dataset_dirs": '{"10_sks cat": {"n_repeats": 10, "img_count": 4}}', "ss_reg_dataset_dirs": "{}",
        "ss_resolution": "(512, 448)", "ss_batch_size_per_device": "2", "ss_enable_bucket": "True", "ss_flip_aug": "True",
        "ss_keep_tokens": "1", "ss_total_batch_size": "4", "ss_gradient_accumulation_steps": "1",
    }  # fmt: skip
    Path("out").mkdir()
    save_file({"a": torch.zeros(1)}, "out/mine.safetensors", metadata)
    monkeypatch.setattr(sys, "argv", shlex.split(FROM_METADATA)[1:])
    assert train_network.main() == 0
    command, _, data = capsys.readouterr().out.partition("# mine.toml")
    options = parse_options(shlex.split(command.strip().splitlines()[-1])[5:])
    assert (options.network.network_dim, options.network.network_alpha, options.training.seed) == (16, 8.0, 7)
    assert options.network.network_args == ["conv_dim=8"] and options.optimizer.optimizer_args == ["betas=(0.9,0.99)"]
    assert options.augmentation.cache_latents and "2 processes" in command and "not recorded" in command
    Path("mine.toml").write_text(data, encoding="utf-8")
    (dataset,) = datasets_from_file(Path("mine.toml"), DatasetDefaults())
    subset = dataset.subsets[0]
    assert tuple(dataset.resolution) == (512, 448) and dataset.batch_size == 2 and dataset.enable_bucket
    assert (subset.num_repeats, subset.class_tokens, subset.flip_aug, subset.keep_tokens) == (10, "sks cat", True, 1)


def test_the_messages_of_the_page():
    messages = re.findall(r"^\| `error: (.+?)` \|", PAGE, re.MULTILINE)
    for message, text in zip(messages, ("learning_rat = 1", 'cache_latents = "yes"', None), strict=True):
        name = "train.toml" if text else "train.tml"
        if text:
            Path(name).write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as error:
            parse_options([f"--config_file={name}"])
        assert message in str(error.value)
    assert DOCTOR == "python tools/doctor.py"  # tests/tools/test_doctor.py runs it
