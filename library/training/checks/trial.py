"""The optimizer and the schedule, tried on a dummy parameter before a model loads.

Some arguments pass the constructor and fail in the first step, and some schedules end before the run does.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import torch

from library.errors import UserError, one_line
from library.training.optimization.optimizers import create_optimizer, optimizer_name
from library.training.optimization.schedules import OnPlateau, create_schedule, schedule_name, walk_through
from library.training.options import OptimizerOptions


def trial_optimizer(options: OptimizerOptions) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer after one step on a small parameter, and its full name. It prints nothing.

    Raises UserError if it is not there, does not take its arguments, or fails in its first step.
    """
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    name = f"--optimizer_type {optimizer_name(options)}"
    with redirect_stdout(io.StringIO()):
        optimizer, described = create_optimizer(options, [{"params": [parameter]}], torch.device("cpu"), lambda note: None)
        parameter.grad = torch.full_like(parameter, 0.01)
        try:
            optimizer.step()
        except Exception as error:
            raise UserError(f"{name} fails in its first step: {one_line(error)}; change --optimizer_args") from error
    if not bool(torch.isfinite(parameter).all()):
        raise UserError(f"{name} makes NaN or infinity in its first step; change --optimizer_args or --learning_rate")
    return optimizer, described


def try_schedule(options: OptimizerOptions, total_steps: int) -> None:
    """Go through all steps of a run with its schedule. Raises UserError as `trial_optimizer` does, or for the schedule."""
    optimizer, _ = trial_optimizer(options)
    schedule = create_schedule(options, optimizer, total_steps)
    optimizer.step()
    if isinstance(schedule, OnPlateau):
        schedule.validated(1.0)
    walk_through(schedule, schedule_name(options), total_steps)
