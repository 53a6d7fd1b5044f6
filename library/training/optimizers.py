"""Optimizers by name, each from its own package, imported only when it is asked for."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from library.errors import UserError, nearest, unknown
from library.training.optimizer_rules import fitted
from library.training.options import OptimizerOptions

_BNB = ("bitsandbytes", "bitsandbytes.optim.")
_DADAPT = ("dadaptation", "dadaptation.")
_DADAPT_EXPERIMENTAL = ("dadaptation", "dadaptation.experimental.")
_SCHEDULE_FREE = ("schedulefree", "schedulefree.")
_NESTEROV = {"nesterov": True, "momentum": 0.9}

# name -> ((what to install, where it is), class, arguments that the name stands for)
_BY_NAME: dict[str, tuple[tuple[str, str], str, dict[str, Any]]] = {
    "AdamW": (("torch", "torch.optim."), "AdamW", {}),
    "AdamW8bit": (_BNB, "AdamW8bit", {}),
    "PagedAdamW": (_BNB, "PagedAdamW", {}),
    "PagedAdamW8bit": (_BNB, "PagedAdamW8bit", {}),
    "PagedAdamW32bit": (_BNB, "PagedAdamW32bit", {}),
    "Lion": (("lion-pytorch", "lion_pytorch."), "Lion", {}),
    "Lion8bit": (_BNB, "Lion8bit", {}),
    "PagedLion8bit": (_BNB, "PagedLion8bit", {}),
    "SGDNesterov": (("torch", "torch.optim."), "SGD", _NESTEROV),
    "SGDNesterov8bit": (_BNB, "SGD8bit", _NESTEROV),
    "AdaFactor": (("transformers", "transformers.optimization."), "Adafactor", {}),
    # Version 0.6 of sd-scripts, which the guides describe, means DAdaptAdam by this name; later ones mean DAdaptAdamPreprint.
    "DAdaptation": (_DADAPT, "DAdaptAdam", {}),
    "DAdaptAdam": (_DADAPT, "DAdaptAdam", {}),
    "DAdaptAdaGrad": (_DADAPT, "DAdaptAdaGrad", {}),
    "DAdaptAdan": (_DADAPT, "DAdaptAdan", {}),
    "DAdaptLion": (_DADAPT, "DAdaptLion", {}),
    "DAdaptSGD": (_DADAPT, "DAdaptSGD", {}),
    "DAdaptAdamPreprint": (_DADAPT_EXPERIMENTAL, "DAdaptAdamPreprint", {}),
    "DAdaptAdanIP": (_DADAPT_EXPERIMENTAL, "DAdaptAdanIP", {}),
    "Prodigy": (("prodigyopt", "prodigyopt."), "Prodigy", {}),
    "AdamWScheduleFree": (_SCHEDULE_FREE, "AdamWScheduleFree", {}),
    "RAdamScheduleFree": (_SCHEDULE_FREE, "RAdamScheduleFree", {}),
    "SGDScheduleFree": (_SCHEDULE_FREE, "SGDScheduleFree", {}),
}
OPTIMIZERS = tuple(_BY_NAME)
_ANY_CASE = {name.lower(): name for name in OPTIMIZERS}

UNUSABLE = {"SparseAdam": "it takes sparse gradients only", "LBFGS": "it computes the loss several times a step"}


def optimizer_name(options: OptimizerOptions) -> str:
    """The optimizer asked for, with the old flags understood."""
    if options.use_8bit_adam:
        return "AdamW8bit"
    if options.use_lion_optimizer:
        return "Lion"
    return options.optimizer_type or "AdamW"


def parse_key_values(words: Iterable[str] | None, option: str) -> dict[str, Any]:
    """`key=value` words as a dictionary; values are Python literals (`0.01`, `True`, `(0.9,0.99)`), else text."""
    values: dict[str, Any] = {}
    for word in words or ():
        key, sign, value = word.partition("=")
        if not sign or not key.strip().isidentifier():
            raise UserError(f"{option}: expected key=value, got '{word}'")
        try:
            values[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            values[key.strip()] = value.strip()
    return values


def import_class(dotted: str, option: str, install: str | None = None) -> type:
    """The class that a dotted path names; a missing package is reported with what to install."""
    module_name, _, class_name = dotted.rpartition(".")
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
        (package, place), class_name, arguments = _BY_NAME[_ANY_CASE[name.lower()]]
        return import_class(place + class_name, f"--optimizer_type {name}", package), arguments
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
    options: OptimizerOptions, groups: list[dict[str, Any]], device: torch.device, tell: Callable[[str], Any] = print
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer over the network's parameter groups, and its full name with arguments for the metadata.

    `tell` gets what the optimizer does otherwise than the options say. Raises UserError for arguments that do not fit.
    """
    name = optimizer_name(options)
    cls, defaults = optimizer_class(name)
    given = parse_key_values(options.optimizer_args, "--optimizer_args")
    if name.lower().startswith("paged") and device.type != "cuda":
        tell(f"--optimizer_type {name}: there is no GPU memory to move state out of; it does the same as {name[5:]} here")
    fit = fitted(cls, options, groups, {**_in_one_call(cls, device, given), **defaults, **given})
    for note in fit.notes:
        tell(f"--optimizer_type {name}: {note}")
    try:
        optimizer = cls(fit.groups, **fit.arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_args do not fit {name}: {error}") from error
    if averages_weights(optimizer):
        optimizer.train()
    described = f"{cls.__module__}.{cls.__name__}"
    if given:
        described += "(" + ",".join(f"{key}={value}" for key, value in given.items()) + ")"
    return optimizer, described


def _in_one_call(cls: type, device: torch.device, given: Iterable[str]) -> dict[str, bool]:
    """Have torch's AdamW change all parameters in one call on a CPU.

    That takes 5 ms for SD 1.5's 256 parameters at rank 4, where its loop over them takes 25. On a GPU it does nearly so
    by itself. Whoever chooses a way by --optimizer_args gets that one.
    """
    chosen = {"fused", "foreach", "differentiable"} & set(given)
    return {"fused": True} if cls is torch.optim.AdamW and device.type == "cpu" and not chosen else {}


def averages_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it trains one set of weights and means another, their average, to be used: the schedule-free ones do."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # as accelerate wraps it
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@contextmanager
def weights_to_use(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the network has the weights that are meant to be used, afterwards those that are trained, bit for bit."""
    if not averages_weights(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()  # which would give them back but for rounding
        with torch.no_grad():
            for parameter, value in zip(parameters, trained, strict=True):
                parameter.copy_(value)


def found_rates(optimizer: torch.optim.Optimizer) -> list[float] | None:
    """d * lr of each group, the rate in force, for optimizers that find d by themselves; None for others."""
    if not all("d" in group for group in optimizer.param_groups):
        return None
    return [float(group["d"]) * float(group["lr"]) for group in optimizer.param_groups]
