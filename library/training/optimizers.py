"""Optimizers by name, each from its own package, imported only when it is asked for."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable
from typing import Any

import torch

from library.errors import UserError, nearest, unknown
from library.training.options import OptimizerOptions

# name in lower case -> (class, what to install, arguments that the name stands for)
OPTIMIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("torch.optim.AdamW", "torch", {}),
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", "bitsandbytes", {}),
    "pagedadamw": ("bitsandbytes.optim.PagedAdamW", "bitsandbytes", {}),
    "pagedadamw8bit": ("bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes", {}),
    "pagedadamw32bit": ("bitsandbytes.optim.PagedAdamW32bit", "bitsandbytes", {}),
    "lion": ("lion_pytorch.Lion", "lion-pytorch", {}),
    "lion8bit": ("bitsandbytes.optim.Lion8bit", "bitsandbytes", {}),
    "pagedlion8bit": ("bitsandbytes.optim.PagedLion8bit", "bitsandbytes", {}),
    "sgdnesterov": ("torch.optim.SGD", "torch", {"nesterov": True, "momentum": 0.9}),
    "sgdnesterov8bit": ("bitsandbytes.optim.SGD8bit", "bitsandbytes", {"nesterov": True, "momentum": 0.9}),
}

UNUSABLE = {"SparseAdam": "it takes sparse gradients only", "LBFGS": "it computes the loss several times a step"}

# They need rules of their own in the loop (own step sizes, train/eval modes): an issue of its own.
NOT_YET = ("adafactor", "dadapt", "prodigy", "schedulefree")


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
    key = name.lower()
    if key in OPTIMIZERS:
        path, package, arguments = OPTIMIZERS[key]
        return import_class(path, f"--optimizer_type {name}", package), arguments
    if key.startswith(NOT_YET) or key.endswith("schedulefree"):
        raise UserError(f"--optimizer_type {name} is not built yet; AdamW, AdamW8bit and Lion are")
    if name.rpartition(".")[2] in UNUSABLE:
        raise UserError(f"--optimizer_type {name} cannot train a network here: {UNUSABLE[name.rpartition('.')[2]]}; use AdamW")
    if "." in name:
        return import_class(name, f"--optimizer_type {name}"), {}
    if hasattr(torch.optim, name):
        return getattr(torch.optim, name), {}
    close = nearest(name, [path.rpartition(".")[2] for path, _, _ in OPTIMIZERS.values()])
    raise UserError(f"--optimizer_type {name} is not known; " + (f"did you mean {close}?" if close else "give package.Class for your own"))


def create_optimizer(
    options: OptimizerOptions, groups: list[dict[str, Any]], device: torch.device
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer over the network's parameter groups, and its full name with arguments for the metadata."""
    name = optimizer_name(options)
    cls, defaults = optimizer_class(name)
    given = parse_key_values(options.optimizer_args, "--optimizer_args")
    if name.lower().startswith("paged") and device.type != "cuda":
        raise UserError(f"--optimizer_type {name} needs an NVIDIA GPU; use {name[5:]} here")
    try:
        optimizer = cls(groups, lr=options.learning_rate, **{**defaults, **given})
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_args do not fit {name}: {error}") from error
    described = f"{cls.__module__}.{cls.__name__}"
    if given:
        described += "(" + ",".join(f"{key}={value}" for key, value in given.items()) + ")"
    return optimizer, described
