"""Learning-rate schedules by name. The formulas come from transformers; here is only who gets which arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from library.errors import UserError, unknown
from library.training.optimizer_rules import is_schedule_free
from library.training.optimizers import import_class, parse_key_values
from library.training.options import OptimizerOptions

SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    "warmup_stable_decay", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "piecewise_constant", "reduce_lr_on_plateau",
)  # fmt: skip


class OnPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """Lowers the rates when the validation loss has stopped falling; the loss of training is too noisy to show that."""

    def step(self) -> None:
        """An optimizer step changes nothing."""

    def validated(self, loss: float) -> None:
        """Take in the loss of a validation."""
        super().step(loss)


def waits_for_validation(options: OptimizerOptions) -> bool:
    """Whether the schedule needs pictures to validate with."""
    return (options.lr_scheduler_type or options.lr_scheduler).rpartition(".")[2] in ("reduce_lr_on_plateau", "ReduceLROnPlateau")


def steps_of(value: int | float, total: int) -> int:
    """A number of optimizer steps from steps (int) or a share of all steps (float below 1)."""
    return value if isinstance(value, int) else math.floor(value * total)


def create_schedule(options: OptimizerOptions, optimizer: torch.optim.Optimizer, total_steps: int):
    """The learning-rate schedule; it ticks once an optimizer step, whatever the number of processes.

    total_steps: optimizer steps of the whole run.
    Raises UserError for an unknown name or arguments that do not fit.
    """
    own = _schedule_of_optimizer(options, optimizer)
    if own is not None:
        return own
    if options.lr_scheduler_type:
        return _custom_schedule(options, optimizer)
    check_name(options.lr_scheduler)
    warmup = steps_of(options.lr_warmup_steps, total_steps)
    if options.lr_scheduler in ("constant", "reduce_lr_on_plateau") and warmup:
        raise UserError(f"--lr_warmup_steps has no place in --lr_scheduler {options.lr_scheduler}; use constant_with_warmup")
    if warmup > total_steps:
        raise UserError(f"--lr_warmup_steps is {warmup}, more than all {total_steps} steps of the run")
    try:
        return _makers(options, warmup, total_steps)[options.lr_scheduler](optimizer)
    except (TypeError, ValueError) as error:
        raise UserError(f"the arguments do not fit --lr_scheduler {options.lr_scheduler}: {error}") from error


def check_name(name: str) -> None:
    """Refuse a schedule that does not exist or needs something else."""
    if name.startswith("adafactor"):
        raise UserError(f"--lr_scheduler {name} belongs to --optimizer_type=AdaFactor, which takes it by itself; leave it out")
    if name not in SCHEDULES:
        raise unknown("--lr_scheduler", name, SCHEDULES)


def _schedule_of_optimizer(options: OptimizerOptions, optimizer: torch.optim.Optimizer):
    """The schedule of an optimizer that has its own ways; None if it takes any."""
    if optimizer.param_groups[0].get("relative_step"):
        from transformers.optimization import AdafactorSchedule

        return AdafactorSchedule(optimizer, initial_lr=options.learning_rate)
    if is_schedule_free(type(optimizer)):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return None


def schedule_facts(options: OptimizerOptions, optimizer: torch.optim.Optimizer) -> dict[str, str | None]:
    """Metadata of a schedule that is the optimizer's own."""
    if not optimizer.param_groups[0].get("relative_step"):
        return {}
    return {"ss_lr_scheduler": f"adafactor:{options.learning_rate}", "ss_learning_rate": None}


def _makers(options: OptimizerOptions, warmup: int, total: int) -> dict[str, Callable]:
    from transformers import optimization as t

    given = parse_key_values(options.lr_scheduler_args, "--lr_scheduler_args")
    min_ratio = options.lr_scheduler_min_lr_ratio
    decay = steps_of(options.lr_decay_steps, total)

    def least() -> float:
        return _required(min_ratio, "--lr_scheduler_min_lr_ratio", options.lr_scheduler)

    return {
        "constant": lambda o: t.get_constant_schedule(o, **given),
        "constant_with_warmup": lambda o: t.get_constant_schedule_with_warmup(o, warmup, **given),
        "linear": lambda o: t.get_linear_schedule_with_warmup(o, warmup, total, **given),
        "cosine": lambda o: t.get_cosine_schedule_with_warmup(o, warmup, total, **given),
        "cosine_with_restarts": lambda o: t.get_cosine_with_hard_restarts_schedule_with_warmup(
            o, warmup, total, **{"num_cycles": options.lr_scheduler_num_cycles, **given}
        ),
        "polynomial": lambda o: t.get_polynomial_decay_schedule_with_warmup(
            o, warmup, total, **{"power": options.lr_scheduler_power, **given}
        ),
        "inverse_sqrt": lambda o: t.get_inverse_sqrt_schedule(
            o, warmup, **{"timescale": options.lr_scheduler_timescale, **given}
        ),
        "warmup_stable_decay": lambda o: t.get_wsd_schedule(
            o, num_warmup_steps=warmup, num_stable_steps=max(0, total - warmup - decay), num_decay_steps=decay,
            **{"min_lr_ratio": min_ratio or 0.0, **given},
        ),
        "cosine_with_min_lr": lambda o: t.get_cosine_with_min_lr_schedule_with_warmup(
            o, warmup, total, min_lr_rate=least(), **given
        ),
        "cosine_warmup_with_min_lr": lambda o: t.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            o, warmup, total, min_lr_rate=least(), **given
        ),
        "piecewise_constant": lambda o: _piecewise_constant(o, given),
        "reduce_lr_on_plateau": lambda o: OnPlateau(o, **given),
    }  # fmt: skip


def _piecewise_constant(optimizer: torch.optim.Optimizer, given: dict):
    from diffusers.optimization import get_piecewise_constant_schedule

    rules = _required(given.get("step_rules"), "--lr_scheduler_args step_rules=1:10,0.1:20,0.01", "piecewise_constant")
    return get_piecewise_constant_schedule(optimizer, str(rules))


def _required(value, option: str, schedule: str):
    if value is None:
        raise UserError(f"--lr_scheduler {schedule} needs {option}")
    return value


def _custom_schedule(options: OptimizerOptions, optimizer: torch.optim.Optimizer):
    name = options.lr_scheduler_type
    if options.lr_warmup_steps:
        raise UserError(
            "--lr_warmup_steps cannot be used with --lr_scheduler_type; give its own arguments in --lr_scheduler_args"
        )
    cls = import_class(name if "." in name else f"torch.optim.lr_scheduler.{name}", f"--lr_scheduler_type {name}")
    cls = OnPlateau if cls is torch.optim.lr_scheduler.ReduceLROnPlateau else cls
    try:
        return cls(optimizer, **parse_key_values(options.lr_scheduler_args, "--lr_scheduler_args"))
    except (TypeError, ValueError) as error:
        raise UserError(f"--lr_scheduler_args do not fit {name}: {error}") from error
