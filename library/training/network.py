"""The network to train: create it with the module that --network_module names, and attach it to the model."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from library.errors import UserError, counted
from library.formats.low_rank import require_finite
from library.key_values import read_pairs
from library.models.family import Family, Model
from library.network_modules import (
    AdapterNetwork,
    check_module_arguments,
    import_network_module,
    is_ours,
    merging_module,
    module_arguments,
    network_from_file,
    user_errors,
)
from library.option_traits import required
from library.training.options import NetworkOptions, OptimizerOptions


@dataclass
class TrainedNetwork:
    """A network that is attached to a model, with its parameter groups for the optimizer."""

    module: AdapterNetwork
    groups: list[dict[str, Any]]
    group_names: list[str]
    trains_text_encoder: bool

    @property
    def rank_and_alpha(self) -> tuple[int | str, float | str]:
        """Rank and alpha that its modules have in common; `Dynamic` where they differ."""
        tensors = self.module.state_dict()
        ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith("lora_down.weight")}
        alphas = {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}
        return ranks.pop() if len(ranks) == 1 else "Dynamic", alphas.pop() if len(alphas) == 1 else "Dynamic"

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything the optimizer changes, in the order of the groups."""
        return [parameter for group in self.groups for parameter in group["params"]]


def check_network_args(options: NetworkOptions) -> None:
    """Check the module's name and --network_args without a model, as far as the module offers that (`parse_network_args`)."""
    module = import_network_module(options.module_name)
    arguments = read_pairs(options.network_args, "--network_args")
    check_module_arguments(module, arguments, "--network_args")
    if hasattr(module, "parse_network_args"):
        with user_errors(f"--network_module {options.network_module}"):
            module.parse_network_args(module_arguments(module, arguments), options.network_dropout)


def merge_base_weights(options: NetworkOptions, module: ModuleType, model: Model) -> None:
    """Merge the files of --base_weights into the model, each at its strength, before anything is trained on it."""
    strengths = options.base_weights_multiplier or []
    for index, path in enumerate(options.base_weights or ()):
        strength = strengths[index] if index < len(strengths) else 1.0
        where = f"--base_weights {path}"
        network, weights = network_from_file(merging_module(module), path, strength, model, where=where, for_inference=True)
        with user_errors(where):
            network.merge_to(*model.for_networks(), weights, model.denoiser.dtype, model.denoiser.device)
        print(f"merged {path} into the model at strength {strength}")


def build_network(
    network: NetworkOptions, optimizer: OptimizerOptions, model: Model, clip_skip: int | None = None
) -> TrainedNetwork:
    """Create the network as the options say, attach it to the model, and make its parameter groups.

    The frozen model must already be on its device and in its dtype.
    """
    module = import_network_module(network.module_name)
    merge_base_weights(network, module, model)
    instance = _create(network, module, model)
    _attach(network, instance, model, parts_with_modules(network, optimizer, model.family))
    if network.network_weights and not network.dim_from_weights:
        with user_errors(f"--network_weights {network.network_weights}", module):
            instance.load_weights(network.network_weights)
        require_finite(instance.state_dict(), f"--network_weights {network.network_weights}")
        print(f"continuing from {network.network_weights}")
    instance.requires_grad_(True)
    leave_untrained: Any = getattr(instance, "leave_untrained", None)  # beyond the contract
    if leave_untrained is not None:
        leave_untrained(*model.for_networks(), model.unread_layers(clip_skip))
    rates = text_encoder_rates(optimizer, len(model.text_encoders))
    with user_errors("learning rates"):
        groups, names = _parameter_groups(instance, optimizer, rates)
    if network.scale_weight_norms:
        check_max_norm(instance, model)
    return TrainedNetwork(
        module=instance,
        groups=groups,
        group_names=names,
        trains_text_encoder=trains_text_encoder(network, optimizer, len(model.text_encoders)),
    )


def text_encoder_rates(options: OptimizerOptions, encoders: int) -> float | list[float] | None:
    """--text_encoder_lr for a model with this many text encoders; further rates are ignored."""
    rates = options.text_encoder_lr
    if not isinstance(rates, list):
        return rates
    if len(rates) < encoders:
        raise UserError(
            f"--text_encoder_lr has {counted(len(rates), 'rate')} for {encoders} text encoders; give one, or one for each"
        )
    return rates[0] if encoders == 1 else rates[:encoders]


def trains_text_encoder(network: NetworkOptions, optimizer: OptimizerOptions, encoders: int) -> bool:
    """Whether any of a model's text encoders is trained with a rate above 0."""
    return not network.network_train_unet_only and any(_rate_of_each_encoder(optimizer, encoders))


def parts_with_modules(network: NetworkOptions, optimizer: OptimizerOptions, family: Family) -> set[str]:
    """The parts of the model, by name, that the network has modules for: those that are trained.

    With --network_weights also those whose rate is 0, or what the file holds for them would be lost.
    """
    texts = [] if network.network_train_unet_only else family.text_parts
    denoisers = [] if network.network_train_text_encoder_only else [part for part in family.parts if part.role == "denoiser"]
    rates = dict(zip((part.name for part in texts), _rate_of_each_encoder(optimizer, len(family.text_parts)), strict=False))
    rates |= {part.name: optimizer.learning_rate if optimizer.unet_lr is None else optimizer.unet_lr for part in denoisers}
    return {name for name, rate in rates.items() if rate or network.network_weights}


def _rate_of_each_encoder(optimizer: OptimizerOptions, encoders: int) -> list[float]:
    rates = text_encoder_rates(optimizer, encoders)
    return rates if isinstance(rates, list) else [optimizer.learning_rate if rates is None else rates] * encoders


def check_max_norm(instance: AdapterNetwork, model: Model) -> None:
    """Raises UserError if the network cannot limit the norms of its modules, before the first step would."""
    if not hasattr(instance, "apply_max_norm_regularization"):
        raise UserError("--scale_weight_norms: this network module has no such thing; leave the option out")
    with user_errors("--scale_weight_norms"):
        instance.apply_max_norm_regularization(1e9, model.denoiser.device)  # too large to change anything


def _create(options: NetworkOptions, module: ModuleType, model: Model) -> AdapterNetwork:
    arguments = module_arguments(module, read_pairs(options.network_args, "--network_args"))
    parts = (model.vae, *model.for_networks())
    if options.network_dropout is not None:
        arguments["neuron_dropout"] = options.network_dropout
    if options.dim_from_weights:
        where = f"--network_weights {options.network_weights}"
        return network_from_file(
            module, required(options.network_weights, "network_weights"), 1.0, model, where=where, **arguments
        )[0]
    dim = 4 if options.network_dim is None else options.network_dim
    words = f" with --network_args {' '.join(options.network_args)}" if options.network_args and not is_ours(module) else ""
    with user_errors(f"--network_module {options.network_module}{words}", module):
        return module.create_network(1.0, dim, options.network_alpha, *parts, **arguments)


def _attach(options: NetworkOptions, instance: AdapterNetwork, model: Model, parts: set[str]) -> None:
    family = model.family
    texts = {part.name for part in family.text_parts}
    leave_out: Any = getattr(instance, "leave_out", None)  # beyond the contract
    with user_errors(f"--network_module {options.network_module}", import_network_module(options.module_name)):
        if leave_out is not None:
            leave_out(*model.for_networks(), [model.parts[name] for name in texts - parts])
        instance.apply_to(*model.for_networks(), bool(texts & parts), bool(parts - texts))
        if options.dim_from_weights:
            instance.load_weights(required(options.network_weights, "network_weights"))


def _parameter_groups(
    instance: AdapterNetwork, options: OptimizerOptions, text_rates: float | list[float] | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Groups and their names for logging; modules of third parties return the groups alone."""
    result = instance.prepare_optimizer_params(text_rates, options.unet_lr, options.learning_rate)
    groups, names = result if isinstance(result, tuple) else (result, [])
    groups = [{**group, "params": list(group["params"])} for group in groups]
    return groups, list(names) or [f"group{index}" for index in range(len(groups))]
