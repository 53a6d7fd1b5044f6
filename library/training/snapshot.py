"""What belongs to the state of a run, and how it is put back: so that a run that goes on does what it would have done anyway."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import RunFailed, UserError
from library.training.compatible import START_ANEW, check_same_run
from library.training.randomness import random_state, set_random_state
from library.training.state import State

if TYPE_CHECKING:
    from library.training.trainer import Trainer


def capture(trainer: Trainer) -> State:
    """The state of a run between two steps. Raises RunFailed if the network holds a NaN."""
    trainer.losses.flush()
    network = network_tensors(trainer.network.module)
    broken = [name for name, tensor in network.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise RunFailed(
            f"no state was saved: {broken[0]} holds NaN or infinity; lower --learning_rate or use --mixed_precision bf16"
        )
    losses, loss_numbers = trainer.losses.state()
    state = State(
        record={
            "output_name": trainer.options.output.output_name,
            "step": trainer.step, "next": trainer.next, "seed": trainer.seed, "max_steps": trainer.plan.max_steps,
            "skipped": trainer.skipped, "losses": loss_numbers, "validations": trainer.validations.state(),
            "metadata": trainer.metadata.identity(),
            "run": trainer.fingerprint,
        },
        tensors={"network": network, "losses": losses},
        objects={
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": trainer.schedule.state_dict(),
            "random": random_state(trainer.accelerator.device),
        },
    )  # fmt: skip
    if trainer.average is not None:
        state.record["average_updates"] = trainer.average.updates
        state.tensors["average"] = {str(number): weight for number, weight in enumerate(trainer.average.weights)}
    if trainer.accelerator.scaler is not None:
        state.objects["scaler"] = trainer.accelerator.scaler.state_dict()
    return state


def restore(trainer: Trainer, state: State, folder: Path) -> None:
    """Put a run where the state's run was. Raises UserError, saying what differs, if the state is that of another run."""
    check_same_run(state.record, trainer.fingerprint, folder)
    load_network(trainer.network.module, state.tensors["network"], folder)
    if trainer.average is not None:
        trainer.average.updates = state.record["average_updates"]
        for number, weight in enumerate(trainer.average.weights):
            weight.copy_(state.tensors["average"][str(number)])
    load_optimizer(trainer.optimizer, state.objects["optimizer"])
    trainer.schedule.load_state_dict(state.objects["schedule"])
    if trainer.accelerator.scaler is not None and "scaler" in state.objects:
        trainer.accelerator.scaler.load_state_dict(state.objects["scaler"])
    trainer.losses.load_state(state.tensors["losses"], state.record["losses"])
    trainer.validations.load_state(state.record["validations"])
    trainer.metadata.take_identity(state.record["metadata"])
    trainer.skipped = state.record["skipped"]
    set_random_state(state.objects["random"], trainer.accelerator.device)


def network_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything a network holds, by name: what is trained, what is not, and buffers."""
    return {name: tensor.detach().clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


@torch.no_grad()
def load_network(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy a state's tensors into the network, in place, so that the optimizer keeps its parameters."""
    own = dict((*module.named_parameters(), *module.named_buffers()))
    wrong = sorted(own.keys() ^ tensors.keys()) or [
        name for name in own if (own[name].shape, own[name].dtype) != (tensors[name].shape, tensors[name].dtype)
    ]
    if wrong:
        raise UserError(f"--resume {folder}: the network of the state has another form, first at {wrong[0]}; {START_ANEW}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict`, without its change of number formats: it would round float32 state of bf16 weights."""
    optimizer.load_state_dict(saved)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            loaded = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)
