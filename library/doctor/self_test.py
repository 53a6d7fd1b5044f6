"""The self test: all trials one after another, and their table. A trial that fails is a row of the table."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from library.doctor.trial_run import STEPS, Result, TrialFailed, TrialTooLong, run_trial
from library.doctor.trials import Trial

SECONDS = 290  # for all trials together
MIN_SECONDS = 15  # with less time left no trial is started
# Largest differences of a trial that works: of the loss (relative) and of the image (mean, in levels of 255).
SAME_NOISE, OTHER_NOISE = (0.05, 4.0), (0.15, 16.0)

Run = Callable[[Trial, Path, float], Result]


@dataclass(frozen=True)
class Row:
    """One line of the table. state: `works`, `differs`, `fails`, `no end`, `not here` or `not tried`, with the reason.

    loss_difference: (loss - reference) / reference. image_difference: mean absolute difference, in levels of 255. memory: peak in
    GiB, of the GPU if one is used.
    """

    name: str
    state: str
    reason: str = ""
    compared_with: str | None = None
    loss: float | None = None
    loss_difference: float | None = None
    image_difference: float | None = None
    seconds_per_step: float | None = None
    memory: float | None = None


def self_test(trials: Iterable[Trial], run: Run = run_trial, seconds: float = SECONDS) -> list[Row]:
    """Run the trials, with a progress line on standard error."""
    from tqdm import tqdm

    ends, rows, results = time.monotonic() + seconds, [], {}
    with tempfile.TemporaryDirectory(prefix="self-test-", ignore_cleanup_errors=True) as folder:
        progress = tqdm(list(trials), desc="self test", unit="trial", leave=False)
        for number, trial in enumerate(progress):
            progress.set_postfix_str(trial.name)
            left = ends - time.monotonic()
            if trial.missing:
                rows.append(Row(trial.name, "not here", trial.missing))
            elif left < MIN_SECONDS:
                rows.append(Row(trial.name, "not tried", f"the {seconds:.0f} s of the self test were over"))
            else:
                try:
                    results[trial.name] = run(trial, Path(folder) / str(number), min(left, trial.seconds))
                except TrialFailed as failure:
                    rows.append(Row(trial.name, "no end" if isinstance(failure, TrialTooLong) else "fails", str(failure)))
                else:
                    rows.append(compare(trial, results))
    return rows


def compare(trial: Trial, results: dict[str, Result]) -> Row:
    """The row of a trial with a result, compared with the result of its reference if there is one."""
    own, reference = results[trial.name], results.get(trial.reference or "")
    row = Row(trial.name, "works", loss=own.loss, seconds_per_step=own.seconds_per_step, memory=own.memory)
    if reference is None:
        return replace(row, reason=f"nothing to compare with: {trial.reference} failed") if trial.reference else row
    loss = (own.loss - reference.loss) / reference.loss
    image = float(abs(own.image - reference.image).mean())
    most_loss, most_image = SAME_NOISE if trial.same_noise else OTHER_NOISE
    state = "works" if abs(loss) <= most_loss and image <= most_image else "differs"
    row = replace(row, state=state, compared_with=trial.reference, loss_difference=loss, image_difference=image)
    return replace(row, reason=trial.if_differs) if state == "differs" else row


def table(rows: list[Row]) -> str:
    """The rows as text. A row without numbers has its reason instead."""
    width = max(len("trial"), *(len(row.name) for row in rows))
    lines = [f"  {'trial':<{width}}  result       loss    image  s a step  memory"]
    for row in rows:
        line = f"  {row.name:<{width}}  {row.state:<9}"
        if row.loss is not None:
            line += f" {_loss(row):>7} {_number(row.image_difference, 2):>8} {_number(row.seconds_per_step, 3):>9}"
            line += f"  {_number(row.memory, 2)} GiB" if row.memory is not None else ""
        lines.append(f"{line}  {row.reason}".rstrip())
    compared = dict.fromkeys(row.compared_with for row in rows if row.compared_with)
    return "\n".join([
        f"Self test: {STEPS} steps each" + (f", compared with {' and '.join(compared)}" if compared else ""),
        *lines,
        "  loss: on held-out images, of the reference itself and then the difference; image: mean difference in levels of 255",
    ])  # fmt: skip


def _loss(row: Row) -> str:
    return f"{row.loss:.4f}" if row.loss_difference is None else f"{row.loss_difference:+.2%}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
