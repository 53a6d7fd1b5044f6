"""--resume and --initial_*: where a run begins, and whether the state that it goes on from is one of its own."""

from __future__ import annotations

import secrets
import warnings
from dataclasses import dataclass
from pathlib import Path

from library.data.dataset import TrainingDataset
from library.errors import UserError
from library.training.compatible import check_same_run, early_fingerprint
from library.training.hub import fetch_state
from library.training.options import TrainNetworkOptions
from library.training.plan import Plan, Start
from library.training.snapshot import restore
from library.training.state import State, find_state, read_state
from library.training.trainer import Trainer


@dataclass(frozen=True)
class ResumedState:
    """A whole state and the folder it was read from."""

    folder: Path
    state: State


def open_state(options: TrainNetworkOptions) -> ResumedState | None:
    """The state that --resume names, read and found whole."""
    if not options.state.resume:
        return None
    on_hub = options.hub.resume_from_huggingface
    path = fetch_state(options.state.resume, options.hub.huggingface_token) if on_hub else Path(options.state.resume)
    folder = find_state(path, options.output.output_name)
    state = read_state(folder)
    print(f"resuming from {folder}, {state.record['step']} steps are done")
    return ResumedState(folder, state)


def chosen_seed(options: TrainNetworkOptions, resumed: ResumedState | None) -> int:
    """--seed, else that of the state, else a new one."""
    given = options.training.seed
    if resumed is None:
        return secrets.randbelow(2**32) if given is None else given
    seed = resumed.state.record["seed"]
    if given not in (None, seed):
        raise UserError(f"--resume {resumed.folder}: the state's seed is {seed} and --seed {given}; leave out --seed")
    return seed


def check_start(options: TrainNetworkOptions, plan: Plan, dataset: TrainingDataset, resumed: ResumedState | None) -> Start:
    """Where the run begins, after checking as far as can be done without the model that the state is one of this run."""
    if resumed is None:
        return Start.of(options.state, plan, None)
    record = resumed.state.record
    check_same_run(record, early_fingerprint(options, dataset.table, plan.processes), resumed.folder)
    start = Start.of(options.state, plan, Start(record["step"], *record["next"]))
    if record["max_steps"] != plan.max_steps:
        print(
            f"the run was to have {record['max_steps']} steps and now has {plan.max_steps}: "
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


def begin_at(trainer: Trainer, start: Start, resumed: ResumedState | None) -> None:
    """Put a new trainer at its start: with the state's content, or else with a schedule that has come so far."""
    if resumed is not None:
        restore(trainer, resumed.state, resumed.folder)
    elif start.step:
        with warnings.catch_warnings():  # torch's, that the optimizer did not move
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(start.step):
                trainer.schedule.step()
    trainer.step, trainer.epoch, trainer.position = start.step, start.epoch, start.position
    trainer.next = (start.epoch, start.position)
    if start.step:
        print(
            f"starting after step {start.step}: {start.position} of {trainer.plan.turns_per_epoch} batches "
            f"of epoch {start.epoch} are done"
        )
