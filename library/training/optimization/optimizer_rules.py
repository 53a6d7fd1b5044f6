"""Optimizers that need other groups or arguments than the options give, or that ignore some options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from library.errors import UserError
from library.training.options import OptimizerOptions


@dataclass
class OptimizerCall:
    """Parameter groups and keyword arguments for the constructor of an optimizer, and notes for the user."""

    groups: list[dict[str, Any]]
    arguments: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def adafactor(options: OptimizerOptions, call: OptimizerCall) -> OptimizerCall:
    """AdaFactor (Shazeer and Stern 2018, arXiv 1804.04235) computes its own rates unless relative_step=False."""
    arguments = call.arguments
    if arguments.get("warmup_init") and not arguments.get("relative_step", True):
        call.notes.append("warmup_init needs relative_step, which is switched on")
        arguments["relative_step"] = True
    if arguments.setdefault("relative_step", True):
        arguments["lr"] = None
        call.groups = [{key: value for key, value in group.items() if key != "lr"} for group in call.groups]
        unused = ["--learning_rate"] + [f"--{name}" for name in ("unet_lr", "text_encoder_lr") if getattr(options, name)]
        if options.lr_scheduler != "constant" or options.lr_scheduler_type:
            unused.append("--lr_scheduler")
        call.notes.append(
            f"it computes its own learning rates (relative_step), so {', '.join(unused)} {'are' if len(unused) > 1 else 'is'} "
            'not used; to set the rate give --optimizer_args "relative_step=False"'
        )
        return call
    if options.lr_scheduler == "constant" and not options.lr_scheduler_type:
        call.notes.append("with relative_step=False, --lr_scheduler=constant_with_warmup is usual")
    if options.max_grad_norm:
        call.notes.append("it limits its steps by itself (clip_threshold), so --max_grad_norm=0 is usual")
    if arguments.get("clip_threshold", 1.0) != 1.0:
        call.notes.append("clip_threshold=1.0 is usual")
    return call


def finding_rate(options: OptimizerOptions, call: OptimizerCall) -> OptimizerCall:
    """D-Adaptation and Prodigy multiply the learning rate by a number that they find."""
    rates = {group.get("lr", call.arguments["lr"]) for group in call.groups}
    if len(rates - {0}) > 1:
        raise UserError(
            f"--optimizer_type {options.optimizer_type} finds one learning rate for everything and was given several "
            f"({', '.join(map(str, sorted(rates)))}); "
            "leave out --unet_lr, --text_encoder_lr and rates by block or LoRA+, and give --learning_rate=1"
        )
    if max(rates) <= 0.1:
        call.notes.append(
            f"it multiplies the rate that it finds by --learning_rate, and {max(rates):g} makes that small; 1 is usual"
        )
    return call


def without_schedule(options: OptimizerOptions, call: OptimizerCall) -> OptimizerCall:
    """Schedule-free optimizers average weights instead of lowering the rate."""
    if options.lr_scheduler != "constant" or options.lr_scheduler_type or options.lr_warmup_steps:
        call.notes.append(
            "it needs no schedule, so --lr_scheduler and --lr_warmup_steps are not used; "
            'for a warm-up give --optimizer_args "warmup_steps=100"'
        )
    return call
