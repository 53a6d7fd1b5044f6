"""Learning-rate schedules by name. The formulas come from transformers; this file passes them their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from library.errors import UserError, counted, one_line, unknown
from library.key_values import arguments_for, read_pairs
from library.training.optimization.optimizers import computes_rates, import_class, spec_of
from library.training.options import OptimizerOptions

SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    "warmup_stable_decay", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "piecewise_constant", "reduce_lr_on_plateau",
)  # fmt: skip

# Arguments that --lr_scheduler_args must not hold.
GIVEN_ELSEWHERE = {
    "optimizer": "it is that of --optimizer_type",
    "last_epoch": "a schedule begins where the run does; to go on with a run give --resume",
    "num_warmup_steps": "give --lr_warmup_steps",
    "num_training_steps": "it is the number of steps of the run; give --max_train_steps",
    "num_decay_steps": "give --lr_decay_steps",
    "num_stable_steps": "it is what --lr_warmup_steps and --lr_decay_steps leave",
    "min_lr_rate": "give --lr_scheduler_min_lr_ratio",
}


class OnPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """Lowers the rates when the validation loss has stopped falling; the loss of training is too noisy to show that."""

    def step(self, *_: Any) -> None:
        """An optimizer step changes nothing."""

    def validated(self, loss: float) -> None:
        """Take in the loss of a validation."""
        super().step(loss)


def waits_for_validation(options: OptimizerOptions) -> bool:
    """Whether the schedule needs images to validate with."""
    return (options.lr_scheduler_type or options.lr_scheduler).rpartition(".")[2] in ("reduce_lr_on_plateau", "ReduceLROnPlateau")


def steps_of(value: int | float, total: int) -> int:
    """A number of optimizer steps from steps (int) or a share of all steps (float below 1)."""
    return value if isinstance(value, int) else math.floor(value * total)


def create_schedule(options: OptimizerOptions, optimizer: torch.optim.Optimizer, total_steps: int):
    """The learning-rate schedule, to be stepped once an optimizer step, whatever the number of processes.

    total_steps: optimizer steps of the whole run.
    Raises UserError for an unknown name or arguments that do not fit.
    """
    own = _schedule_of_optimizer(options, optimizer)
    if own is not None:
        return own
    if options.lr_scheduler_type:
        return _custom_schedule(options, optimizer)
    check_name(options.lr_scheduler)
    check_needs(options)
    warmup = steps_of(options.lr_warmup_steps, total_steps)
    if options.lr_scheduler in ("constant", "reduce_lr_on_plateau") and warmup:
        raise UserError(f"--lr_warmup_steps has no place in --lr_scheduler {options.lr_scheduler}; use constant_with_warmup")
    if warmup > total_steps:
        raise UserError(f"--lr_warmup_steps is {warmup:,}, more than the {counted(total_steps, 'step')} of the run")
    make, own = _named_schedules(options, warmup, total_steps)[options.lr_scheduler]
    given = arguments_for(make, options.lr_scheduler_args, "--lr_scheduler_args", GIVEN_ELSEWHERE)
    try:
        return make(optimizer, **{**own, **given})
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the arguments do not fit --lr_scheduler {options.lr_scheduler}: {one_line(error)}") from error


def check_name(name: str) -> None:
    """Refuse a schedule that does not exist or needs something else."""
    if name.startswith("adafactor"):
        raise UserError(f"--lr_scheduler {name} belongs to --optimizer_type=AdaFactor, which takes it by itself; leave it out")
    if name not in SCHEDULES:
        raise unknown("--lr_scheduler", name, SCHEDULES)


def _schedule_of_optimizer(options: OptimizerOptions, optimizer: torch.optim.Optimizer):
    """The schedule of an optimizer that allows no other; None if it allows any."""
    if computes_rates(optimizer):
        from transformers.optimization import AdafactorSchedule

        return AdafactorSchedule(optimizer, initial_lr=options.learning_rate)
    if spec_of(type(optimizer)).schedule_free:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return None


def schedule_facts(options: OptimizerOptions, optimizer: torch.optim.Optimizer) -> dict[str, str | None]:
    """Metadata for an optimizer that computes its own rates."""
    if not computes_rates(optimizer):
        return {}
    return {"ss_lr_scheduler": f"adafactor:{options.learning_rate}", "ss_learning_rate": None}


def _named_schedules(options: OptimizerOptions, warmup: int, total: int) -> dict[str, tuple[Callable, dict[str, Any]]]:
    """What makes the schedule of each name, and the arguments that come from options of their own."""
    from transformers import optimization as t

    ratio, decay = options.lr_scheduler_min_lr_ratio, steps_of(options.lr_decay_steps, total)
    rise, course = {"num_warmup_steps": warmup}, {"num_warmup_steps": warmup, "num_training_steps": total}
    cycles = {"num_cycles": options.lr_scheduler_num_cycles}
    stages = {"num_stable_steps": max(0, total - warmup - decay), "num_decay_steps": decay}
    return {
        "constant": (t.get_constant_schedule, {}),
        "constant_with_warmup": (t.get_constant_schedule_with_warmup, rise),
        "linear": (t.get_linear_schedule_with_warmup, course),
        "cosine": (t.get_cosine_schedule_with_warmup, course),
        "cosine_with_restarts": (t.get_cosine_with_hard_restarts_schedule_with_warmup, course | cycles),
        "polynomial": (t.get_polynomial_decay_schedule_with_warmup, course | {"power": options.lr_scheduler_power}),
        "inverse_sqrt": (t.get_inverse_sqrt_schedule, rise | {"timescale": options.lr_scheduler_timescale}),
        "warmup_stable_decay": (t.get_wsd_schedule, rise | stages | {"min_lr_ratio": ratio or 0.0}),
        "cosine_with_min_lr": (t.get_cosine_with_min_lr_schedule_with_warmup, course | {"min_lr_rate": ratio}),
        "cosine_warmup_with_min_lr": (
            t.get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
            course | {"min_lr_rate": ratio},
        ),
        "piecewise_constant": (_piecewise_constant, {}),
        "reduce_lr_on_plateau": (OnPlateau, {}),
    }


def _piecewise_constant(optimizer: torch.optim.Optimizer, step_rules: str):
    from diffusers.optimization import get_piecewise_constant_schedule

    return get_piecewise_constant_schedule(optimizer, step_rules)


def check_needs(options: OptimizerOptions) -> None:
    """UserError for a schedule that lacks what it needs."""
    name = options.lr_scheduler
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and options.lr_scheduler_min_lr_ratio is None:
        raise UserError(f"--lr_scheduler {name} needs --lr_scheduler_min_lr_ratio")
    if name == "piecewise_constant" and "step_rules" not in read_pairs(options.lr_scheduler_args, "--lr_scheduler_args"):
        raise UserError(f"--lr_scheduler {name} needs --lr_scheduler_args step_rules=1:10,0.1:20,0.01")


def _custom_schedule(options: OptimizerOptions, optimizer: torch.optim.Optimizer):
    name = options.lr_scheduler_type
    if options.lr_warmup_steps:
        raise UserError(
            "--lr_warmup_steps cannot be used with --lr_scheduler_type; give its own arguments in --lr_scheduler_args"
        )
    cls = import_class(name if "." in name else f"torch.optim.lr_scheduler.{name}", f"--lr_scheduler_type {name}")
    cls = OnPlateau if cls is torch.optim.lr_scheduler.ReduceLROnPlateau else cls
    elsewhere = {key: GIVEN_ELSEWHERE[key] for key in ("optimizer", "last_epoch")}
    given = arguments_for(cls, options.lr_scheduler_args, "--lr_scheduler_args", elsewhere)
    try:
        return cls(optimizer, **given)
    except Exception as error:
        raise UserError(f"--lr_scheduler_args do not fit {name}: {one_line(error)}") from error


def schedule_name(options: OptimizerOptions) -> str:
    """The option that names the schedule, with its value."""
    if options.lr_scheduler_type:
        return f"--lr_scheduler_type {options.lr_scheduler_type}"
    return f"--lr_scheduler {options.lr_scheduler}"


def walk_through(schedule: Any, name: str, total_steps: int) -> None:
    """Take all steps of a run with a schedule, on a dummy optimizer.

    Raises UserError for one that ends before the run or computes no rate.
    """
    for step in range(1, total_steps + 1):
        try:
            schedule.step()
            rates = [float(group["lr"]) for group in schedule.optimizer.param_groups]
        except Exception as error:
            raise UserError(
                f"{name} does not last for the {counted(total_steps, 'step')} of the run: {one_line(error)} (at step {step}); "
                "change --lr_scheduler_args or --max_train_steps"
            ) from error
        if not all(map(math.isfinite, rates)):
            raise UserError(f"{name} gives no learning rate at step {step}, but {rates[0]}; change --lr_scheduler_args")
