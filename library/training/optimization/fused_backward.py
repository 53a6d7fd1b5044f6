"""--fused_backward_pass: each parameter is changed as soon as its gradient is there, and the gradient is freed.

So one gradient at a time is in memory. The step is the ordinary one, bit for bit, except for clipping: the norm of all gradients
is not known, so --max_grad_norm limits that of each parameter.
"""

from __future__ import annotations

import torch

from library.errors import UserError
from library.training.optimization.optimizers import optimizer_name, spec_named
from library.training.options import OptimizerOptions, TrainingOptions


def check_fused_backward(optimizer: OptimizerOptions, training: TrainingOptions, processes: int) -> None:
    """Raises UserError for options that need all gradients of a step at once."""
    name = optimizer_name(optimizer)
    spec = spec_named(name)
    reasons = [
        (
            training.gradient_accumulation_steps > 1,
            "with --gradient_accumulation_steps gradients must be kept until the step",
        ),
        (
            training.mixed_precision == "fp16",
            "fp16 looks at all gradients before it takes a step; use --mixed_precision bf16",
        ),
        (processes > 1, "several processes add up their gradients before a step"),
        (
            spec.finds_rate or spec.schedule_free,
            f"{name} looks at all gradients together; use AdamW, Lion or AdaFactor",
        ),
    ]
    for wrong, reason in reasons:
        if wrong:
            raise UserError(f"--fused_backward_pass: {reason}")


def step_in_backward(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Have every parameter of the optimizer take its step within the backward pass. The optimizer's state stays where it is."""
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(_stepper(optimizer, index, max_grad_norm))


def _stepper(optimizer: torch.optim.Optimizer, index: int, max_grad_norm: float):
    def step(parameter: torch.nn.Parameter) -> None:
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_([parameter], max_grad_norm)
        groups = optimizer.param_groups
        optimizer.param_groups = [{**groups[index], "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        parameter.grad = None

    return step
