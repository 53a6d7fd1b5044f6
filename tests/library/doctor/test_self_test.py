from __future__ import annotations

import time

import numpy as np
import pytest

from library.doctor.self_test import Row, self_test, table
from library.doctor.trial_run import Result, TrialFailed, TrialTooLong
from library.doctor.trials import CPU, Trial

REFERENCE = Trial(CPU, reference=None)


def result(loss: float = 0.4, grey: float = 100) -> Result:
    return Result(loss, np.full((4, 4, 3), grey, np.float32), 0.5, 0.75)


def rows_of(*trials: Trial, results: dict[str, Result | str | Exception], **settings) -> dict[str, Row]:
    """The rows of these trials with made results; a text is why one fails."""

    def run(trial, folder, seconds):
        found = results[trial.name]
        if isinstance(found, Exception):
            raise found
        if isinstance(found, str):
            raise TrialFailed(found)
        return found

    return {row.name: row for row in self_test(trials, run, **settings)}


def test_a_small_difference_works_and_a_large_one_differs():
    trials = [REFERENCE, *(Trial(name) for name in ("near", "loss", "image")), Trial("other noise", same_noise=False)]
    rows = rows_of(*trials, results={
        CPU: result(), "near": result(0.404, 101), "loss": result(0.44), "image": result(grey=110),
        "other noise": result(0.44, 110),
    })  # fmt: skip
    assert {name: row.state for name, row in rows.items()} == {
        CPU: "works", "near": "works", "loss": "differs", "image": "differs", "other noise": "works",
    }  # fmt: skip
    assert rows["near"].loss_difference == pytest.approx(0.01) and rows["near"].image_difference == pytest.approx(1)
    assert rows[CPU].loss_difference is None and rows["near"].compared_with == CPU


def test_what_fails_is_a_row_and_the_others_go_on():
    rows = rows_of(REFERENCE, Trial("bad"), Trial("good"), results={CPU: result(), "bad": "no kernel", "good": result()})
    assert (rows["bad"].state, rows["bad"].reason, rows["good"].state) == ("fails", "no kernel", "works")


def test_a_trial_without_an_end_is_no_failure_and_an_expected_difference_is_named():
    trials = [REFERENCE, Trial("slow"), Trial("coarse", if_differs="as expected"), Trial("fine", if_differs="as expected")]
    made = {CPU: result(), "slow": TrialTooLong("stopped after 75 s"), "coarse": result(grey=106), "fine": result()}
    rows = rows_of(*trials, results=made)
    assert (rows["slow"].state, rows["slow"].reason) == ("no end", "stopped after 75 s")
    assert (rows["coarse"].state, rows["coarse"].reason, rows["fine"].reason) == ("differs", "as expected", "")
    assert "as expected" in table(list(rows.values()))


def test_without_its_reference_a_trial_says_so():
    row = rows_of(REFERENCE, Trial("good"), results={CPU: "exit code 1", "good": result()})["good"]
    assert row.state == "works" and row.reason == "nothing to compare with: float32, CPU failed" and row.loss_difference is None


def test_what_a_machine_lacks_is_not_run():
    row = rows_of(Trial("fp16", missing="fp16 needs a GPU"), results={})["fp16"]
    assert (row.state, row.reason) == ("not here", "fp16 needs a GPU")


def test_when_the_time_is_over_nothing_more_is_begun(monkeypatch):
    clock = iter([0.0, 0.0, 95.0])
    limits = []

    def run(trial, folder, seconds):
        limits.append(seconds)
        return result()

    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    rows = self_test([REFERENCE, Trial("late")], run, seconds=100)
    assert limits == [REFERENCE.seconds] and rows[1].state == "not tried" and "100 s" in rows[1].reason


def test_the_table():
    text = table([
        Row(CPU, "works", loss=0.34852, seconds_per_step=0.5, memory=0.664),
        Row("bf16", "works", "", CPU, 0.34869, 0.0005, 0.709, 0.8, None),
        Row("fp16", "not here", "fp16 needs a GPU"),
    ])  # fmt: skip
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "Self test: 6 steps each, compared with float32, CPU"
    assert lines[2:5] == [
        "float32, CPU works 0.3485 0.500 0.66 GiB", "bf16 works +0.05% 0.71 0.800", "fp16 not here fp16 needs a GPU",
    ]  # fmt: skip
