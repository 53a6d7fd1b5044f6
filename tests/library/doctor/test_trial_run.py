from __future__ import annotations

import sys
import time

import psutil
import pytest

from library.doctor import trial_run
from library.doctor.trial_run import TrialFailed, TrialTooLong, environment, reason, result, run_trial
from library.doctor.trials import Trial
from library.models.saving import save_stable_diffusion
from library.testing import small_stable_diffusion


def test_a_training_gives_a_loss_an_image_its_time_and_memory(tmp_path):
    base = tmp_path / "model.safetensors"
    save_stable_diffusion(small_stable_diffusion(unet_channels=(32, 64), vae_channels=(32, 32, 32, 32)), base)
    made = run_trial(Trial("float32", on_cpu=True), tmp_path / "trial", 200, base)
    assert 0 < made.loss < 10 and made.image.shape == (64, 64, 3) and made.image.std() > 0
    assert 0 < made.seconds_per_step < 100 and 0.1 < made.memory < 20


def test_a_training_that_ends_early_fails_with_its_own_words(tmp_path):
    with pytest.raises(TrialFailed, match="no-such-model"):
        run_trial(Trial("float32"), tmp_path / "trial", 200, tmp_path / "no-such-model.safetensors")


def test_a_training_without_an_end_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    note = tmp_path / "child"
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    monkeypatch.setattr(trial_run, "command", lambda trial, base: [sys.executable, "-c", code])
    with pytest.raises(TrialTooLong, match="stopped after 5 s"):
        run_trial(Trial("float32"), tmp_path / "trial", 5)
    child = int(note.read_text())
    ends = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < ends
        time.sleep(0.1)


@pytest.mark.parametrize(
    "text, code, expected",
    [
        ("training\nerror: fp16 needs a GPU;   use bf16\n", 2, "fp16 needs a GPU; use bf16"),
        (
            "Traceback (most recent call last):\n  File\nRuntimeError: no kernel image\n\n",
            1,
            "exit code 1: RuntimeError: no kernel image",
        ),
        ("", -9, "ended by signal 9"),
    ],
)
def test_why_a_training_ended(text, code, expected):
    assert reason(text, code) == expected


@pytest.mark.parametrize(
    "text, expected",
    [("speed  0.5 s a step\n", "did not say"), ("validation after step 6: nan\n  speed  0.5 s a step\n", "the loss is nan")],
)
def test_a_training_that_ends_well_without_a_good_loss_fails(tmp_path, text, expected):
    with pytest.raises(TrialFailed, match=expected):
        result(text, tmp_path)


def test_a_lora_of_zeros_was_not_trained(tmp_path):
    import torch
    from safetensors.torch import save_file

    text = "validation after step 6: 0.3\n  speed  0.5 s a step\n"
    for value in (0.0, float("nan")):
        save_file({"a.lora_up.weight": torch.full((2, 2), value)}, tmp_path / "trial.safetensors")
        with pytest.raises(TrialFailed, match="did not change, or are not finite"):
            result(text, tmp_path)
    idle = {"b.lora_up.weight": torch.zeros(2, 2)}  # query and key of one position
    save_file({"a.lora_up.weight": torch.ones(2, 2), **idle}, tmp_path / "trial.safetensors")
    with pytest.raises(TrialFailed, match="no image was drawn"):
        result(text, tmp_path)


def test_the_reference_sees_no_gpu():
    assert environment(Trial("a", on_cpu=True))["ACCELERATE_USE_CPU"] == "true"
    assert "ACCELERATE_USE_CPU" not in environment(Trial("a"))
