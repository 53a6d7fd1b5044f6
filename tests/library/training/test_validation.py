"""Validation: the same question every time, without a trace in training; early stopping and the best file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import AfterStep, image_folder, tensors_of, train, use_two_blocks, words_of_a_run

from library.errors import UserError
from library.training import validation as validation_module
from library.training.randomness import random_state, undisturbed
from library.training.setup import Run
from library.training.validation import Validation, ValidationRecord, fixed_noise, validation_timesteps

UNET = ("--network_train_unet_only", "--cache_latents", "--validation_split=0.4")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("validation") / "images")


@pytest.fixture
def run(images, tmp_path, monkeypatch) -> Callable[..., Run]:
    use_two_blocks(monkeypatch.setattr)
    return lambda folder, *words, listeners=(): train(words_of_a_run(images, tmp_path / folder, *words), *listeners)


def test_timesteps_are_the_inner_points_of_an_even_division():
    assert validation_timesteps() == [200, 400, 600, 800]
    assert validation_timesteps(500, 1000) == [600, 700, 800, 900]


def test_noise_belongs_to_image_and_timestep_and_to_nothing_else():
    shape = torch.Size((2, 4, 8, 8))
    noise = fixed_noise(1, ["a", "b"], 200, shape)
    assert torch.equal(noise, fixed_noise(1, ["a", "b"], 200, shape))
    assert torch.equal(noise.flip(0), fixed_noise(1, ["b", "a"], 200, shape)), "whatever batch it is in"
    others = (fixed_noise(2, ["a", "b"], 200, shape), fixed_noise(1, ["a", "b"], 400, shape), noise.flip(0))
    assert not any(torch.equal(noise, other) for other in others)
    assert abs(noise.std() - 1) < 0.1


def test_generators_stand_as_they_stood():
    device = torch.device("cpu")
    before = random_state(device)
    with undisturbed(device):
        torch.rand(3)
        torch.manual_seed(3)
    after = random_state(device)
    assert torch.equal(before["torch"], after["torch"]) and torch.equal(before["python"][1], after["python"][1])


def test_training_has_the_same_bytes_with_validation_and_without(run, tmp_path):
    words = ("--max_train_steps=4", "--network_dropout=0.2", "--flip_aug", *UNET)
    often = run("often", *words, "--validate_every_n_steps=1")
    never = run("never", *words, "--validate_every_n_epochs=100")
    assert [step for step, _ in often.validator.record.history] == [1, 2, 3, 4]
    assert [step for step, _ in never.validator.record.history] == [4], "the last weights are always measured"
    assert never.validator.record.history[-1] == often.validator.record.history[-1]
    a, b = (tensors_of(tmp_path / name / "mine.safetensors") for name in ("often", "never"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert often.losses.values == never.losses.values
    assert often.network.module.training and not often.model.denoiser.training


def test_fixed_noise_and_timesteps_make_a_smooth_curve(run, monkeypatch):
    words = ("--max_train_steps=8", "--validate_every_n_steps=1", "--learning_rate=1e-5", *UNET)
    fixed = [loss for _, loss in run("fixed", *words).validator.record.history]
    drawn = iter(range(10**9))
    monkeypatch.setattr(validation_module, "fixed_noise", lambda seed, names, t, shape: fixed_noise(next(drawn), names, t, shape))

    def anywhere(made: Run) -> None:
        generator = torch.Generator().manual_seed(next(drawn))
        made.validator.validation.timesteps = torch.randint(1000, (4,), generator=generator).tolist()

    random = [loss for _, loss in run("random", *words, listeners=[AfterStep(anywhere)]).validator.record.history]
    variances = [torch.tensor(curve, dtype=torch.float64).diff().var().item() for curve in (fixed, random)]
    print(f"variance of the changes from validation to validation: fixed {variances[0]:.3g}, random {variances[1]:.3g}")
    assert variances[0] < variances[1] / 1000


def test_the_best_weights_are_kept_and_patience_ends_the_run(run, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 2.0, 2.5, 1.0])
    monkeypatch.setattr(Validation, "loss", lambda self, loss_at: next(losses))
    words = ("--max_train_steps=9", "--validate_every_n_steps=1", "--save_every_n_steps=1", *UNET)
    early = run("out", *words, "--early_stopping_patience=2", "--save_state")
    assert early.loop.progress.step == 4 and early.validator.record.best == (2, 2.0), "an equal loss is no better one"
    best, second, last = (tensors_of(tmp_path / "out" / f"mine{end}.safetensors") for end in ("-best", "-step00000002", ""))
    assert all(torch.equal(best[key], second[key]) for key in best)
    assert not all(torch.equal(best[key], last[key]) for key in best)
    out = capsys.readouterr().out
    assert (
        "mine-best.safetensors (validation loss 2.00000 after step 2)" in out
        and "after step 4: 2 validations were not better" in out
    )
    again = run("out", *words, "--early_stopping_patience=2", f"--resume={tmp_path / 'out'}")
    assert again.loop.progress.step == 4 and "2 validations brought nothing better" in capsys.readouterr().out
    more = run("out", *words, "--early_stopping_patience=3", f"--resume={tmp_path / 'out'}", "--max_train_steps=5")
    assert more.loop.progress.step == 5 and more.validator.record.best == (5, 1.0)


def test_a_loss_of_nan_is_never_the_best():
    record = ValidationRecord()
    assert not record.add(1, float("nan")) and record.add(2, 5.0) and not record.add(3, float("nan"))
    assert (
        record.best == (2, 5.0) and record.without_improvement == 1 and record.is_exhausted(1) and not record.is_exhausted(None)
    )


def test_the_average_is_what_is_validated_and_saved_and_training_goes_on_without_it(run, tmp_path):
    words = ("--max_train_steps=3", *UNET)
    plain, averaged = run("plain", *words), run("averaged", *words, "--ema_decay=0.9")
    for a, b in zip(plain.network.parameters, averaged.network.parameters, strict=True):
        assert torch.equal(a, b)
    saved = tensors_of(tmp_path / "averaged" / "mine.safetensors")
    assert not all(torch.equal(saved[key], tensor) for key, tensor in tensors_of(tmp_path / "plain" / "mine.safetensors").items())
    with averaged.validator.eval_weights():
        held = averaged.network.module.state_dict()
        assert all(torch.equal(held[key], saved[key]) for key in held)
    assert plain.validator.record.history[-1][1] != averaged.validator.record.history[-1][1]


def test_at_most_max_validation_steps_batches_and_each_the_same(run, monkeypatch):
    seen = []
    at = Validation._at
    monkeypatch.setattr(
        Validation, "_at", lambda self, f, batch, t: seen.append((batch.key, tuple(batch.paths), t)) or at(self, f, batch, t)
    )
    run("out", "--max_train_steps=2", "--validate_every_n_steps=1", "--max_validation_steps=1", *UNET)
    assert len(seen) == 8 and seen[:4] == seen[4:] and len({paths for _, paths, _ in seen}) == 1


def test_rates_fall_when_the_validation_loss_does_not_and_resume_as_they_were(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Validation, "loss", lambda self, loss_at: 3.0)
    words = [
        "--validate_every_n_steps=1",
        "--lr_scheduler=reduce_lr_on_plateau",
        "--lr_scheduler_args",
        "patience=1",
        "factor=0.5",
        *UNET,
    ]
    whole = run("whole", "--max_train_steps=5", *words)
    assert whole.step.update.schedule.get_last_lr() == [0.25e-3] and whole.losses.rates["unet"][-1] == (4, 0.5e-3)
    run("out", "--max_train_steps=2", "--save_state", *words)
    again = run("out", "--max_train_steps=5", "--save_state", *words, f"--resume={tmp_path / 'out'}")
    assert again.step.update.schedule.state_dict() == whole.step.update.schedule.state_dict()
    a, b = (tensors_of(tmp_path / name / "mine.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("option", ["--lr_scheduler=reduce_lr_on_plateau", "--early_stopping_patience=1"])
def test_waiting_for_a_validation_with_nothing_to_validate_with_is_refused(run, option):
    with pytest.raises(UserError, match=f"{option.replace('=', ' ').removesuffix(' 1')} needs images to validate with"):
        run("out", "--max_train_steps=1", option)


def test_it_is_in_the_metadata(run, tmp_path):
    from safetensors import safe_open

    run("out", "--max_train_steps=1", *UNET, "--validation_seed=5")
    with safe_open(tmp_path / "out" / "mine.safetensors", "pt") as file:
        meta = file.metadata()
    assert meta["ss_num_validation_images"] == "2" and meta["ss_num_train_images"] == "3"
    assert meta["ss_validation_split"] == "0.4" and meta["ss_validation_seed"] == "5"
    assert meta["ss_validate_every_n_steps"] == meta["ss_max_validation_steps"] == "None"
