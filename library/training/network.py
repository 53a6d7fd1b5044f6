"""The network to train: load the module that --network_module names, create the network, attach it to the model."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from library.errors import UserError, nearest
from library.sd.model import StableDiffusion
from library.training.options import NetworkOptions, OptimizerOptions


@dataclass
class TrainedNetwork:
    """A network that is attached to a model, with its parameter groups for the optimizer."""

    module: torch.nn.Module
    groups: list[dict[str, Any]]
    group_names: list[str]
    trains_text_encoder: bool

    @property
    def rank_and_alpha(self) -> tuple[int | str, float | str]:
        """Rank and alpha that its modules have in common; `Dynamic` where they differ."""
        tensors = self.module.state_dict()
        ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith("lora_down.weight")}
        alphas = {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}
        return tuple(found.pop() if len(found) == 1 else "Dynamic" for found in (ranks, alphas))

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything the optimizer changes, in the order of the groups."""
        return [parameter for group in self.groups for parameter in group["params"]]


def import_network_module(name: str) -> ModuleType:
    """The module that --network_module names; a wrong name is answered with the nearest one that exists."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a module of one's own lies where one works
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        close = nearest(name.replace("\\", "/").replace("/", ".").removesuffix(".py"), _own_modules())
        cure = f"did you mean '{close}'?" if close else _cure_for_missing(name)
        raise UserError(f"--network_module {name}: there is no such module; {cure}")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--network_module {name} does not import: {error}; install what it needs with pip") from error
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module {name} is no network module: it has no create_network; try networks.lora")
    return module


def _own_modules() -> list[str]:
    """Network modules of this suite: those in networks/ that can create a network."""
    spec = importlib.util.find_spec("networks")
    names = [f"networks.{module.name}" for module in pkgutil.iter_modules(spec.submodule_search_locations)] if spec else []
    return [n for n in names if b"def create_network(" in _source(n)]


def _source(module_name: str) -> bytes:
    spec = importlib.util.find_spec(module_name)
    return open(spec.origin, "rb").read() if spec and spec.origin else b""


def _cure_for_missing(name: str) -> str:
    if name.startswith("lycoris"):
        return "run: pip install lycoris-lora"
    return f"known: {', '.join(_own_modules())}; a module of your own must be importable from this folder"


def parse_network_args(words: list[str] | None) -> dict[str, str]:
    """`key=value` words of --network_args; split at the first `=`, values stay text."""
    arguments: dict[str, str] = {}
    for word in words or ():
        key, sign, value = word.partition("=")
        if not sign or not key.strip():
            raise UserError(f"--network_args: expected key=value, got '{word}'")
        arguments[key.strip()] = value.strip()
    return arguments


def check_network_args(options: NetworkOptions) -> None:
    """Check the module's name and --network_args without a model, as far as the module offers that (`parse_network_args`)."""
    module = import_network_module(options.network_module)
    arguments = parse_network_args(options.network_args)
    if hasattr(module, "parse_network_args"):
        with user_errors(f"--network_module {options.network_module}"):
            module.parse_network_args(arguments, options.network_dropout)


class WithTextModel(torch.nn.Module):
    """A text encoder with the level `text_model` above its layers, which `CLIPTextModel` lost in transformers 5.6.

    Files have that level in their names, and modules of others make names by walking through the text encoder.
    """

    def __init__(self, text_encoder: torch.nn.Module) -> None:
        super().__init__()
        self.text_model = text_encoder


def named_text_encoder(module: ModuleType, text_encoder: torch.nn.Module) -> torch.nn.Module:
    """The text encoder as a network module should see it to give its layers the names that files have; ours know them anyway."""
    knows_names = module.__name__.startswith("networks.") or hasattr(text_encoder, "text_model")
    return text_encoder if knows_names else WithTextModel(text_encoder)


def merge_base_weights(options: NetworkOptions, module: ModuleType, model: StableDiffusion) -> None:
    """Merge the files of --base_weights into the model, each at its strength, before anything is trained on it."""
    strengths = options.base_weights_multiplier or []
    text_encoder = named_text_encoder(module, model.text_encoder)
    for index, path in enumerate(options.base_weights or ()):
        strength = strengths[index] if index < len(strengths) else 1.0
        with user_errors(f"--base_weights {path}"):
            network, weights = module.create_network_from_weights(
                strength, path, model.vae, text_encoder, model.unet, for_inference=True
            )
            network.merge_to(text_encoder, model.unet, weights, model.unet.dtype, model.unet.device)
        print(f"merged {path} into the model at strength {strength}")


@contextmanager
def user_errors(where: str) -> Iterator[None]:
    """Turn the one-line ValueErrors of a network module, and assertions of those of others, into UserErrors that name the option."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{where}: {error}") from error
    except AssertionError as error:  # LyCORIS 4.1.3 with its usual preset on Stable Diffusion
        hint = '; add the word "preset=attn-mlp" to --network_args' if "duplicated lora name" in str(error) else ""
        raise UserError(f"{where}: {error or 'an assertion failed'}{hint}") from error


def build_network(network: NetworkOptions, optimizer: OptimizerOptions, model: StableDiffusion) -> TrainedNetwork:
    """Create the network as the options say, attach it to the model, and make its parameter groups.

    The frozen model must already be on its device and in its dtype. A part whose learning rate is 0 is attached and saved, but
    not trained.
    """
    module = import_network_module(network.network_module)
    merge_base_weights(network, module, model)
    instance = _create(network, module, model)
    _attach(network, instance, model)
    if network.network_weights and not network.dim_from_weights:
        with user_errors(f"--network_weights {network.network_weights}"):
            instance.load_weights(network.network_weights)
        print(f"continuing from {network.network_weights}")
    instance.requires_grad_(True)
    if network.scale_weight_norms:
        check_max_norm(instance, model)
    with user_errors("learning rates"):
        groups, names = _parameter_groups(instance, optimizer)
    text_encoder_rate = optimizer.learning_rate if optimizer.text_encoder_lr is None else optimizer.text_encoder_lr
    return TrainedNetwork(
        module=instance,
        groups=groups,
        group_names=names,
        trains_text_encoder=not network.network_train_unet_only and text_encoder_rate > 0,
    )


def check_max_norm(instance: torch.nn.Module, model: StableDiffusion) -> None:
    """A network that cannot shrink its modules says so now, and not after the first step."""
    if not hasattr(instance, "apply_max_norm_regularization"):
        raise UserError("--scale_weight_norms: this network module has no such thing; leave the option out")
    with user_errors("--scale_weight_norms"):
        instance.apply_max_norm_regularization(1e9, model.unet.device)  # so large that it changes nothing


def _create(options: NetworkOptions, module: ModuleType, model: StableDiffusion) -> torch.nn.Module:
    arguments: dict[str, Any] = parse_network_args(options.network_args)
    parts = (model.vae, named_text_encoder(module, model.text_encoder), model.unet)
    if options.network_dropout is not None:
        arguments["neuron_dropout"] = options.network_dropout
    if options.dim_from_weights:
        with user_errors(f"--network_weights {options.network_weights}"):
            instance, _ = module.create_network_from_weights(1.0, options.network_weights, *parts, **arguments)
        return instance
    dim = 4 if options.network_dim is None else options.network_dim
    with user_errors(f"--network_module {options.network_module}"):
        return module.create_network(1.0, dim, options.network_alpha, *parts, **arguments)


def _attach(options: NetworkOptions, instance: torch.nn.Module, model: StableDiffusion) -> None:
    with user_errors(f"--network_module {options.network_module}"):
        instance.apply_to(
            model.text_encoder,
            model.unet,
            not options.network_train_unet_only,
            not options.network_train_text_encoder_only,
        )
        if options.dim_from_weights:
            instance.load_weights(options.network_weights)


def _parameter_groups(instance: torch.nn.Module, options: OptimizerOptions) -> tuple[list[dict[str, Any]], list[str]]:
    """Groups and their names for logging; modules of third parties return the groups alone."""
    result = instance.prepare_optimizer_params(options.text_encoder_lr, options.unet_lr, options.learning_rate)
    groups, names = result if isinstance(result, tuple) else (result, [])
    groups = [{**group, "params": list(group["params"])} for group in groups]
    return groups, list(names) or [f"group{index}" for index in range(len(groups))]
