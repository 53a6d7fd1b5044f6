"""Runs that were saved and resumed end as those that never stopped, bit for bit; what does not fit is refused in one line."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small_runs import picture_folder, tensors_of, train, use_two_blocks, words_of_a_run

from library.errors import RunFailed, UserError
from library.training.options import parse_options
from library.training.plan import Plan, Start
from library.training.trainer import Trainer

UNET = ("--network_train_unet_only", "--cache_latents")
# Keys of a file that tell when it was made, or which run made it. The second hash covers them.
TIMES = {"ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date", "sshs_legacy_hash"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("state") / "pictures")


@pytest.fixture
def run(pictures, tmp_path, monkeypatch) -> Callable[..., Trainer]:
    """`run("a", "--max_train_steps=3")` trains into the folder `a` and gives the trainer as it was at the end."""
    use_two_blocks(monkeypatch.setattr)
    return lambda folder, *words: train(words_of_a_run(pictures, tmp_path / folder, *words))


@pytest.fixture
def interrupt_after(monkeypatch) -> Callable[[int | None], None]:
    """`interrupt_after(2)`: from now on Ctrl-C comes in the second step of a run."""
    update, chosen = Trainer._update, []

    def interrupting(self):
        update(self)
        if chosen[-1:] == [self.step + 1]:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_update", interrupting)
    return chosen.append


def everything(trainer: Trainer) -> dict[str, Any]:
    """All that a run holds at its end, as it lies in memory."""
    return {
        "network": dict(trainer.network.module.named_parameters()) | dict(trainer.network.module.named_buffers()),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.schedule.state_dict(),
        "average": trainer.average.weights if trainer.average else None,
        "losses": (trainer.losses.steps, trainer.losses.values, trainer.losses.average),
        "validations": trainer.validations.state(),
        "place": (trainer.step, trainer.next),
    }


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dictionaries, lists, numbers and tensors are the same in every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


MANY = """
[general]
caption_extension = ".txt"
shuffle_caption = true
caption_dropout_rate = 0.3
flip_aug = true
[[datasets]]
resolution = 64
batch_size = 2
  [[datasets.subsets]]
  image_dir = "{0}"
[[datasets]]
resolution = 128
  [[datasets.subsets]]
  image_dir = "{0}"
  num_repeats = 1
"""

CASES = {
    "plain, in the middle of an epoch": ["--max_train_steps=7"],
    "two datasets, workers, accumulation, captions that change": [
        "--max_train_steps=6", "--gradient_accumulation_steps=2", "--dataset_config=DATA", "--max_data_loader_n_workers=2",
        "--lr_scheduler=cosine", "--lr_warmup_steps=2", "--text_encoder_lr=1e-4",
    ],
    "averaged and validated, dropout": [
        *UNET, "--max_train_steps=7", "--ema_decay=0.9", "--validation_split=0.4", "--validate_every_n_steps=2", "--network_dropout=0.2",
        "--network_args", "rank_dropout=0.2", "module_dropout=0.2",
    ],
    "DyLoRA": [*UNET, "--max_train_steps=7", "--network_module=networks.dylora", "--network_dim=4", "--gradient_accumulation_steps=2"],
    "schedule-free": [*UNET, "--max_train_steps=6", "--optimizer_type=AdamWScheduleFree", "--save_every_n_steps=1", "--learning_rate=1e-2"],
    "Prodigy": [*UNET, "--max_train_steps=6", "--optimizer_type=Prodigy", "--learning_rate=1"],
    "AdaFactor with its own steps": [*UNET, "--max_train_steps=6", "--optimizer_type=AdaFactor"],
    "8-bit optimizer": [*UNET, "--max_train_steps=6", "--optimizer_type=AdamW8bit", "--network_dim=32", "--lr_scheduler=polynomial"],
    "momentum, schedule of torch": [
        *UNET, "--max_train_steps=7", "--optimizer_type=SGDNesterov", "--lr_scheduler_type=OneCycleLR",
        "--lr_scheduler_args", "max_lr=0.1", "total_steps=9",
    ],
    "PiSSA, which also changes the model": [*UNET, "--max_train_steps=6", "--network_args", "init=pissa"],
}  # fmt: skip
EXTRAS = {"schedule-free": "schedulefree", "Prodigy": "prodigyopt"}  # packages that need not be installed


@pytest.mark.parametrize("name", CASES)
def test_trap_5_1_and_5_2_resumed_twice_is_as_never_stopped(run, interrupt_after, name, pictures, tmp_path):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    (tmp_path / "data.toml").write_text(MANY.format(pictures.as_posix()), encoding="utf-8")
    words = [f"--dataset_config={tmp_path / 'data.toml'}" if word == "--dataset_config=DATA" else word for word in CASES[name]]
    whole = run("whole", *words)
    total, parts = whole.plan.max_steps, tmp_path / "parts"
    interrupt_after(2)
    run("parts", *words, "--save_state")
    interrupt_after(total - 2)
    middle = run("parts", *words, "--save_state", f"--resume={parts / 'mine-step00000002-state'}")
    assert middle.step == total - 2 and middle.losses.steps[0] == 1, "trap 5.2: the counter goes on"
    interrupt_after(None)
    part = run("parts", *words, "--save_state", f"--resume={parts}")
    assert same(everything(whole), everything(part))
    assert len(part.losses.values) == len(whole.losses.values) >= total
    ours, theirs = tmp_path / "whole" / "mine.safetensors", parts / "mine.safetensors"
    assert same(tensors_of(ours), tensors_of(theirs))
    a, b = metadata_of(ours), metadata_of(theirs)
    assert a.keys() == b.keys() and {key for key in a if a[key] != b[key]} <= TIMES
    assert len({a["sshs_model_hash"], b["sshs_model_hash"]}) == 1
    assert set(states(parts)) >= {"mine-state", *(f"mine-step{step:08d}-state" for step in (2, total - 2))}


# ---------------------------------------------------------------- names, old ones, what a kill leaves


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_names_of_states_and_which_are_removed(run, tmp_path):
    words = [*UNET, "--max_train_epochs=4", "--save_every_n_epochs=1", "--save_last_n_epochs=3", "--save_last_n_epochs_state=2"]
    run("epochs", *words, "--save_state")
    assert states(tmp_path / "epochs") == ["mine-000002-state", "mine-000003-state", "mine-state"]
    assert (tmp_path / "epochs" / "mine-000001.safetensors").exists()
    words = [*UNET, "--max_train_steps=6", "--save_every_n_steps=1", "--output_name="]
    run("steps", *words, "--save_state", "--save_last_n_steps_state=2")
    assert states(tmp_path / "steps") == ["at-step00000004-state", "at-step00000005-state", "at-step00000006-state", "last-state"]
    run("end", *words, "--save_state_on_train_end", "--max_train_steps=2")
    assert states(tmp_path / "end") == ["last-state"]
