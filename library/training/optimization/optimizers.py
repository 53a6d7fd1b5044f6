"""Optimizers by name, each from its own package, imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from library.errors import UserError, nearest, one_line, unknown
from library.key_values import arguments_for
from library.training.optimization.optimizer_rules import OptimizerCall, adafactor, finding_rate, without_schedule
from library.training.options import OptimizerOptions


@dataclass(frozen=True)
class OptimizerSpec:
    """What the trainer has to know of an optimizer besides that it is a torch.optim.Optimizer."""

    package: str  # what pip installs
    module: str
    class_name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)  # arguments that the name stands for
    prepare: Callable[[OptimizerOptions, OptimizerCall], OptimizerCall] | None = None  # changes rates and arguments for it
    finds_rate: bool = False  # it multiplies the learning rate by a number that it finds
    schedule_free: bool = False  # it averages weights instead of lowering the rate
    may_set_rates: bool = False  # it can compute learning rates by itself, without a schedule
    float32_math: bool = False  # it computes in float32 whatever the format of the weights is
    paged: bool = False  # its state can move out of GPU memory
    fused_on_cpu: bool = False  # it takes `fused=True`, which makes it several times faster on a CPU
    moments: int = 2  # values of its state for each trained parameter
    moment_bits: int = 32


def _of_torch(class_name: str, **traits: Any) -> OptimizerSpec:
    return OptimizerSpec("torch", "torch.optim", class_name, **traits)


def _of_bitsandbytes(class_name: str, bits: int = 8, **traits: Any) -> OptimizerSpec:
    return OptimizerSpec("bitsandbytes", "bitsandbytes.optim", class_name, moment_bits=bits, float32_math=True, **traits)


def _of_dadaptation(class_name: str, module: str = "dadaptation", moments: int = 3) -> OptimizerSpec:
    return OptimizerSpec("dadaptation", module, class_name, prepare=finding_rate, finds_rate=True, moments=moments)


def _of_schedulefree(class_name: str, moments: int = 2) -> OptimizerSpec:
    return OptimizerSpec(
        "schedulefree", "schedulefree", class_name, prepare=without_schedule, schedule_free=True, moments=moments
    )


_NESTEROV = {"nesterov": True, "momentum": 0.9}
_DADAPT_ADAM = _of_dadaptation("DAdaptAdam")
SPECS: dict[str, OptimizerSpec] = {
    "AdamW": _of_torch("AdamW", fused_on_cpu=True),
    "AdamW8bit": _of_bitsandbytes("AdamW8bit"),
    "PagedAdamW": _of_bitsandbytes("PagedAdamW", bits=32, paged=True),
    "PagedAdamW8bit": _of_bitsandbytes("PagedAdamW8bit", paged=True),
    "PagedAdamW32bit": _of_bitsandbytes("PagedAdamW32bit", bits=32, paged=True),
    "Lion": OptimizerSpec("lion-pytorch", "lion_pytorch", "Lion", moments=1),
    "Lion8bit": _of_bitsandbytes("Lion8bit", moments=1),
    "PagedLion8bit": _of_bitsandbytes("PagedLion8bit", moments=1, paged=True),
    "SGDNesterov": _of_torch("SGD", defaults=_NESTEROV, moments=1),
    "SGDNesterov8bit": _of_bitsandbytes("SGD8bit", defaults=_NESTEROV, moments=1),
    "AdaFactor": OptimizerSpec(
        "transformers", "transformers.optimization", "Adafactor", prepare=adafactor, may_set_rates=True, moments=1
    ),
    # Version 0.6 of sd-scripts, which the guides describe, means DAdaptAdam by this name; later ones mean DAdaptAdamPreprint.
    "DAdaptation": _DADAPT_ADAM,
    "DAdaptAdam": _DADAPT_ADAM,
    "DAdaptAdaGrad": _of_dadaptation("DAdaptAdaGrad"),
    "DAdaptAdan": _of_dadaptation("DAdaptAdan", moments=5),
    "DAdaptLion": _of_dadaptation("DAdaptLion", moments=2),
    "DAdaptSGD": _of_dadaptation("DAdaptSGD"),
    "DAdaptAdamPreprint": _of_dadaptation("DAdaptAdamPreprint", "dadaptation.experimental"),
    "DAdaptAdanIP": _of_dadaptation("DAdaptAdanIP", "dadaptation.experimental", moments=5),
    "Prodigy": OptimizerSpec("prodigyopt", "prodigyopt", "Prodigy", prepare=finding_rate, finds_rate=True, moments=4),
    "AdamWScheduleFree": _of_schedulefree("AdamWScheduleFree"),
    "RAdamScheduleFree": _of_schedulefree("RAdamScheduleFree"),
    "SGDScheduleFree": _of_schedulefree("SGDScheduleFree", moments=1),
}
OPTIMIZERS = tuple(SPECS)
_ANY_CASE = {name.lower(): name for name in OPTIMIZERS}
# Arguments that --optimizer_args must not hold. A rate would have no effect: every group of parameters has its own.
GIVEN_ELSEWHERE = {
    "lr": "the learning rate is that of --learning_rate, --unet_lr and --text_encoder_lr; give it there",
    "params": "the options of the network decide what is trained",
}
# Implementations of torch's AdamW. On a CPU "fused" takes 5 ms for the 256 parameters of SD 1.5 at rank 4, the default loop
# 25 ms; on a GPU the default is nearly as fast.
_IMPLEMENTATIONS = {"fused", "foreach", "differentiable"}

UNUSABLE = {"SparseAdam": "it takes sparse gradients only", "LBFGS": "it computes the loss several times a step"}


def optimizer_name(options: OptimizerOptions) -> str:
    """The optimizer asked for, with the old flags understood."""
    if options.use_8bit_adam:
        return "AdamW8bit"
    if options.use_lion_optimizer:
        return "Lion"
    return options.optimizer_type or "AdamW"


def spec_named(name: str) -> OptimizerSpec:
    """The traits of an optimizer by its name (any case) or dotted path, nothing being imported."""
    if name.lower() in _ANY_CASE:
        return SPECS[_ANY_CASE[name.lower()]]
    module, _, class_name = name.rpartition(".")
    return _spec(module or "torch.optim", class_name)


def spec_of(cls: type) -> OptimizerSpec:
    """The traits of an optimizer class."""
    return _spec(cls.__module__, cls.__name__)


def _spec(module: str, class_name: str) -> OptimizerSpec:
    """The row of a class; for a class without a row, the traits that all classes of its package share."""
    package = module.partition(".")[0]
    same_package = [spec for spec in SPECS.values() if spec.module.partition(".")[0] == package]
    for spec in same_package:
        if spec.class_name == class_name:
            return spec
    if same_package and (same_package[0].finds_rate or same_package[0].schedule_free or same_package[0].float32_math):
        return replace(same_package[0], module=module, class_name=class_name, defaults={}, moments=2, moment_bits=32, paged=False)
    return OptimizerSpec(package, module, class_name)


def import_class(dotted: str, option: str, install: str | None = None) -> type:
    """The class that a dotted path names; a missing package is reported with what to install."""
    module_name, _, class_name = dotted.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in dotted.split(".")):
        raise UserError(f"{option}: this is no name of a class; write it as package.module.Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        cure = f"run: pip install {install or module_name.partition('.')[0]}"
        raise UserError(f"{option} needs the package '{module_name.partition('.')[0]}' ({error}); {cure}") from error
    if not hasattr(module, class_name):
        raise unknown("class", f"{module_name}.{class_name}", [f"{module_name}.{n}" for n in dir(module) if n[:1].isupper()])
    return getattr(module, class_name)


def optimizer_class(name: str) -> tuple[type, dict[str, Any]]:
    """The optimizer class for a name (any case) or a dotted path, and the arguments that the name stands for."""
    if name.lower() in _ANY_CASE:
        spec = SPECS[_ANY_CASE[name.lower()]]
        return import_class(f"{spec.module}.{spec.class_name}", f"--optimizer_type {name}", spec.package), dict(spec.defaults)
    if name.rpartition(".")[2] in UNUSABLE:
        raise UserError(f"--optimizer_type {name} cannot train a network here: {UNUSABLE[name.rpartition('.')[2]]}; use AdamW")
    if "." in name:
        cls = import_class(name, f"--optimizer_type {name}")
    elif hasattr(torch.optim, name):
        cls = getattr(torch.optim, name)
    else:
        close = nearest(name, OPTIMIZERS)
        raise UserError(
            f"--optimizer_type {name} is not known; " + (f"did you mean {close}?" if close else "give package.Class for your own")
        )
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or cls is torch.optim.Optimizer:
        raise UserError(f"--optimizer_type {name} is no optimizer; give a class that is made from torch.optim.Optimizer")
    return cls, {}


def create_optimizer(
    options: OptimizerOptions, groups: list[dict[str, Any]], device: torch.device, report: Callable[[str], Any] = print
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer over the network's parameter groups, and its full name with arguments for the metadata.

    report: gets each note about an option that the optimizer does not follow. Raises UserError for arguments that do not fit.
    """
    name = optimizer_name(options)
    cls, defaults = optimizer_class(name)
    given = arguments_for(cls, options.optimizer_args, "--optimizer_args", GIVEN_ELSEWHERE)
    spec = spec_of(cls)
    if spec.paged and device.type != "cuda":
        same = spec.class_name.removeprefix("Paged")
        report(f"--optimizer_type {name}: there is no GPU memory to move state out of; it does the same as {same} here")
    in_one_call = {"fused": True} if spec.fused_on_cpu and device.type == "cpu" and not given.keys() & _IMPLEMENTATIONS else {}
    call = OptimizerCall(groups, {"lr": options.learning_rate, **in_one_call, **defaults, **given})
    call = spec.prepare(options, call) if spec.prepare else call
    for note in call.notes:
        report(f"--optimizer_type {name}: {note}")
    try:
        optimizer = cls(call.groups, **call.arguments)
    except Exception as error:
        raise UserError(f"--optimizer_args do not fit {name}: {one_line(error)}") from error
    if averages_weights(optimizer):
        optimizer.train()
    described = f"{cls.__module__}.{cls.__name__}"
    if given:
        described += "(" + ",".join(f"{key}={value}" for key, value in given.items()) + ")"
    return optimizer, described


def averages_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether eval() swaps in averaged weights, as schedule-free optimizers do."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # as accelerate wraps it
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def computes_rates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether learning rates are computed within each step, as AdaFactor does unless relative_step=False."""
    return bool(optimizer.param_groups[0].get("relative_step"))


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the parameters hold a schedule-free optimizer's averages, afterwards the trained weights, bit for bit."""
    if not averages_weights(optimizer):
        yield
        return
    switch: Any = optimizer  # between trained weights and their averages
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in parameters]
    switch.eval()
    try:
        yield
    finally:
        switch.train()  # gives them back, except for rounding
        with torch.no_grad():
            for parameter, value in zip(parameters, trained, strict=True):
                parameter.copy_(value)


def found_rates(optimizer: torch.optim.Optimizer) -> list[float] | None:
    """d * lr of each group, the rate in force, for optimizers that find d by themselves; None for others."""
    if not all("d" in group for group in optimizer.param_groups):
        return None
    return [float(group["d"]) * float(group["lr"]) for group in optimizer.param_groups]
