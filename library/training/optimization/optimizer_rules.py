"""What certain optimizers want of learning rates and arguments, and what they do with them on their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from library.errors import UserError
from library.training.options import OptimizerOptions


@dataclass
class Fitted:
    """Parameter groups and arguments as an optimizer takes them, and what to tell the user."""

    groups: list[dict[str, Any]]
    arguments: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def adafactor(options: OptimizerOptions, fit: Fitted) -> Fitted:
    """AdaFactor (Shazeer and Stern 2018, arXiv 1804.04235) computes its own rates unless relative_step=False."""
    arguments = fit.arguments
    if arguments.get("warmup_init") and not arguments.get("relative_step", True):
        fit.notes.append("warmup_init needs relative_step, which is switched on")
        arguments["relative_step"] = True
    if arguments.setdefault("relative_step", True):
        arguments["lr"] = None
        fit.groups = [{key: value for key, value in group.items() if key != "lr"} for group in fit.groups]
        unused = ["--learning_rate"] + [f"--{name}" for name in ("unet_lr", "text_encoder_lr") if getattr(options, name)]
        if options.lr_scheduler != "constant" or options.lr_scheduler_type:
            unused.append("--lr_scheduler")
        fit.notes.append(
            f"it computes its own learning rates (relative_step), so {', '.join(unused)} {'are' if len(unused) > 1 else 'is'} "
            'not used; to set the rate give --optimizer_args "relative_step=False"'
        )
        return fit
    if options.lr_scheduler == "constant" and not options.lr_scheduler_type:
        fit.notes.append("with relative_step=False, --lr_scheduler=constant_with_warmup is usual")
    if options.max_grad_norm:
        fit.notes.append("it limits its steps by itself (clip_threshold), so --max_grad_norm=0 is usual")
    if arguments.get("clip_threshold", 1.0) != 1.0:
        fit.notes.append("clip_threshold=1.0 is usual")
    return fit


def finding_rate(options: OptimizerOptions, fit: Fitted) -> Fitted:
    """D-Adaptation and Prodigy multiply the learning rate by a number that they find."""
    rates = {group.get("lr", fit.arguments["lr"]) for group in fit.groups}
    if len(rates - {0}) > 1:
        raise UserError(
            f"--optimizer_type {options.optimizer_type} finds one learning rate for everything and was given several "
            f"({', '.join(map(str, sorted(rates)))}); "
            "leave out --unet_lr, --text_encoder_lr and rates by block or LoRA+, and give --learning_rate=1"
        )
    if max(rates) <= 0.1:
        fit.notes.append(
            f"it multiplies the rate that it finds by --learning_rate, and {max(rates):g} makes that small; 1 is usual"
        )
    return fit


def without_schedule(options: OptimizerOptions, fit: Fitted) -> Fitted:
    """Schedule-free optimizers average weights instead of lowering the rate."""
    if options.lr_scheduler != "constant" or options.lr_scheduler_type or options.lr_warmup_steps:
        fit.notes.append(
            "it needs no schedule, so --lr_scheduler and --lr_warmup_steps are not used; "
            'for a warm-up give --optimizer_args "warmup_steps=100"'
        )
    return fit
