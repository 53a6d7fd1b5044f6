"""--resume and --initial_*: where a run begins, and whether the state that it resumes is its own."""

from __future__ import annotations

import secrets
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.dataset import TrainingDataset
from library.errors import UserError, counted
from library.training.options import HubOptions, TrainNetworkOptions
from library.training.outputs.hub import fetch_state
from library.training.plan import Plan, Progress
from library.training.run_state.compatible import check_same_run, early_fingerprint
from library.training.run_state.state import State, find_state, read_state

if TYPE_CHECKING:
    from library.training.setup import Run


def open_state(resume: str | None, hub: HubOptions, output_name: str | None) -> State | None:
    """The state that --resume names, read and found whole."""
    if not resume:
        return None
    path = fetch_state(resume, hub.huggingface_token) if hub.resume_from_huggingface else Path(resume)
    state = read_state(find_state(path, output_name))
    print(f"resuming from {state.folder}, after {counted(state.record['step'], 'step')}")
    return state


def chosen_seed(given: int | None, resumed: State | None) -> int:
    """--seed, else that of the state, else a new one."""
    if resumed is None:
        return secrets.randbelow(2**32) if given is None else given
    seed = resumed.record["seed"]
    if given not in (None, seed):
        raise UserError(f"--resume {resumed.folder}: the state's seed is {seed} and --seed {given}; leave out --seed")
    return seed


def progress_of(state: State) -> Progress:
    """Where the run of a state was."""
    return Progress(state.record["step"], *state.record["next"])


def check_start(options: TrainNetworkOptions, plan: Plan, dataset: TrainingDataset, resumed: State | None) -> Progress:
    """Where the run begins, after checking as far as can be done without the model that the state is one of this run."""
    if resumed is None:
        return Progress.at_start(options.state, plan, None)
    record = resumed.record
    check_same_run(record, early_fingerprint(options, dataset.table, plan.processes), resumed.folder)
    start = Progress.at_start(options.state, plan, progress_of(resumed))
    if record["max_steps"] != plan.max_steps:
        print(
            f"the run was to have {counted(record['max_steps'], 'step')} and now has {plan.max_steps:,}: "
            "schedule and warm-up follow the new number"
        )
    patience, without = options.validation.early_stopping_patience, record["validations"]["without_improvement"]
    if start.step == plan.max_steps:
        print("all steps are done, so only the last files are written; raise --max_train_steps or --max_train_epochs to train on")
    elif patience and without >= patience:
        print(
            f"{without} validations brought nothing better, so only the last files are written; "
            "raise --early_stopping_patience to train on"
        )
    return start


def begin_at(run: Run, start: Progress, resumed: State | None) -> None:
    """Put a new run at its start: with the state's content, or else with a schedule that has come so far."""
    if resumed is not None:
        run.snapshot.restore(resumed)
    elif start.step:
        with warnings.catch_warnings():  # torch's, that the optimizer did not move
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(start.step):
                run.step.update.schedule.step()
    run.loop.progress = start
    if start.step:
        total = counted(run.plan.micro_batches_per_epoch, "batch", "batches")
        print(f"starting after step {start.step:,}: {start.position:,} of {total} of epoch {start.epoch} done")
