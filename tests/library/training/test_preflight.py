from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest
from PIL import Image

from library.data.config import DatasetDefaults
from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingDataset
from library.errors import UserError, run_entry
from library.training import preflight
from library.training.estimates import estimated_gpu_bytes, network_file_bytes
from library.training.options import parse_options
from library.training.plan import Plan


def options(*words: str, folder: Path = Path()):
    needed = ["--pretrained_model_name_or_path=some/model", f"--train_data_dir={folder}", "--output_dir", str(folder / "out"),
              "--network_module=networks.lora", "--resolution=64", "--learning_rate=1e-4"]  # fmt: skip
    return parse_options([*needed, *words])


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    return tmp_path


def problems(chosen) -> list[str]:
    with pytest.raises(UserError) as error:
        preflight.check_options(chosen, DatasetDefaults(resolution="64"))
    return error.value.problems


def test_everything_that_is_wrong_is_told_at_once_with_its_cure(folder):
    (folder / "file").write_text("x", encoding="utf-8")
    found = problems(options(
        "--pretrained_model_name_or_path=gone.safetensors", "--vae=gone.pt", "--train_data_dir=gone", "--network_weights=gone.pt",
        "--base_weights=gone2.pt", "--network_args", "conv_dm=4", "--optimizer_type=AdamV", "--sample_prompts=gone.txt", "--sample_at_first",
        "--metadata_thumbnail=gone.png", "--resume=gone-state", f"--output_dir={folder / 'file' / 'out'}", f"--logging_dir={folder / 'file' / 'logs'}", folder=folder,
    ))  # fmt: skip
    starts = [
        "--pretrained_model_name_or_path: there is no file", "--vae: there is no file", "", "--output_dir", "--network_weights gone.pt",
        "--base_weights gone2.pt", "--resume gone-state", "--network_module networks.lora: unknown network_args key 'conv_dm'", "--optimizer_type AdamV",
        "--logging_dir", "--sample_prompts gone.txt", "--metadata_thumbnail gone.png",
    ]  # fmt: skip
    assert len(found) == len(starts), found
    for problem, start in zip(found, starts, strict=True):
        assert problem.startswith(start) and ("; " in problem or "did you mean" in problem), problem
    assert "gone" in found[2]


def test_missing_masks_are_told_with_the_rest(folder):
    found = problems(options("--masked_loss", "--conditioning_data_dir=gone", "--vae=gone.pt", folder=folder))
    assert len(found) == 2 and found[1].startswith("--conditioning_data_dir=gone: there is no folder gone")


def test_each_problem_has_a_line_and_the_exit_code_is_2(folder, capsys):
    chosen = options("--vae=gone.pt", "--network_weights=gone.pt", folder=folder)
    with pytest.raises(SystemExit) as end:
        run_entry(lambda: preflight.check_options(chosen, DatasetDefaults(resolution="64")))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 2 and all(line.startswith("error: --") for line in lines)


def test_contradictions_are_told_together(folder):
    with pytest.raises(UserError) as error:
        options("--dim_from_weights", "--sample_at_first", "--log_with=all", folder=folder)
    assert len(error.value.problems) == 3


def test_nothing_wrong_passes_and_hub_names_are_left_to_the_hub(folder):
    preflight.check_options(options(folder=folder), DatasetDefaults(resolution="64"))


def dataset(folder: Path) -> TrainingDataset:
    return TrainingDataset([DatasetConfig(resolution=(64, 64), subsets=(SubsetConfig(image_dir=folder, flip_aug=True),))], seed=1)


def test_a_disk_that_is_too_small_is_told_before_the_model_loads(folder, monkeypatch):
    chosen = options("--network_dim=128", "--max_train_epochs=10", "--save_every_n_epochs=1", "--cache_latents_to_disk", folder=folder)
    plan, data = Plan.of(chosen, 1), dataset(folder)
    needed = preflight.space_needed(chosen, plan, data)
    assert needed[folder / "out"] == 10 * network_file_bytes(chosen) and 280e6 < network_file_bytes(chosen) < 320e6
    assert needed[folder] == 2 * 8 * 8 * 4 * 4  # two latents of 4 x 8 x 8 float32
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0, 0, 10 * network_file_bytes(chosen)))
    with pytest.raises(UserError, match="GiB free and the run writes about .*--save_last_n_epochs"):
        preflight.check_plan(chosen, plan, data, preflight.torch.device("cpu"))
    keep_two = options("--network_dim=128", "--max_train_epochs=10", "--save_every_n_epochs=1", "--save_last_n_epochs=2", folder=folder)
    preflight.check_plan(keep_two, plan, data, preflight.torch.device("cpu"))


def test_a_schedule_that_does_not_fit_is_told_with_the_disk(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0, 0, 0))
    chosen = options("--max_train_steps=4", "--lr_scheduler=cosine", "--lr_warmup_steps=5", folder=folder)
    with pytest.raises(UserError) as error:
        preflight.check_plan(chosen, Plan.of(chosen, 1), dataset(folder), preflight.torch.device("cpu"))
    assert len(error.value.problems) == 2


def test_memory_is_estimated_by_what_counts(folder):
    data = dataset(folder)
    plain, half, saving, large = (
        estimated_gpu_bytes(options(*words, folder=folder), data)
        for words in ([], ["--mixed_precision=fp16"], ["--gradient_checkpointing"], ["--network_dim=128"])
    )
    assert half < plain and saving < plain < large
    assert 4e9 < plain < 6e9  # full size, float32, one tiny picture
