"""The state of a run: the states of its parts. A run that is restored from it goes on as if it had not stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.data.table import ImageTable
from library.errors import RunFailed, UserError
from library.training.options import TrainNetworkOptions
from library.training.outputs.metadata import RunMetadata
from library.training.plan import Plan, Progress
from library.training.randomness import random_state, set_random_state
from library.training.run_state.compatible import START_ANEW, check_same_run, fingerprint
from library.training.run_state.state import State


class Stateful(Protocol):
    """A part of a run that has a state."""

    def state(self) -> State: ...

    def load_state(self, state: State) -> None: ...


class Snapshot:
    """Takes and restores the state of a run between two steps. parts: in the order in which they are restored."""

    def __init__(self, parts: Sequence[Stateful]) -> None:
        self.parts = parts

    def take(self, progress: Progress) -> State:
        """Raises RunFailed if the network holds a NaN."""
        own = State(record={"step": progress.step, "next": (progress.epoch, progress.position)})
        return State.of([own, *(part.state() for part in self.parts)])

    def restore(self, state: State) -> None:
        """Raises UserError, saying what differs, if the state is that of another run."""
        for part in self.parts:
            part.load_state(state)


class RunIdentity:
    """Which run a state belongs to. model: the digest of the frozen model."""

    def __init__(
        self, options: TrainNetworkOptions, table: ImageTable, model: str, plan: Plan, seed: int, metadata: RunMetadata
    ) -> None:
        self.options, self.table, self.model, self.plan, self.seed, self.metadata = options, table, model, plan, seed, metadata

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """By which a state is known to be one of this run; it reads through all captions, so only runs with states make it."""
        return fingerprint(self.options, self.table, self.model, self.plan.processes)

    def state(self) -> State:
        """Seed and length, what was trained on what, and the metadata that all files of the run share."""
        record = {
            "output_name": self.options.output.output_name, "seed": self.seed, "max_steps": self.plan.max_steps,
            "metadata": self.metadata.identity(), "run": self.fingerprint,
        }  # fmt: skip
        return State(record)

    def load_state(self, state: State) -> None:
        """Take the identity of the state's run. Raises UserError, saying what differs, if this is another run."""
        check_same_run(state.record, self.fingerprint, state.folder)
        self.metadata.take_identity(state.record["metadata"])


class RandomNumbers:
    """All generators that a run draws from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state(self) -> State:
        return State(objects={"random": random_state(self.device)})

    def load_state(self, state: State) -> None:
        set_random_state(state.objects["random"], self.device)


def network_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything a network holds, by name: what is trained, what is not, and buffers."""
    return {name: tensor.detach().clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def reject_nonfinite(network: Mapping[str, Tensor]) -> None:
    """Raises RunFailed if a tensor holds NaN or infinity: such a state is useless."""
    broken = [name for name, tensor in network.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise RunFailed(
            f"no state was saved: {broken[0]} holds NaN or infinity; lower --learning_rate or use --mixed_precision bf16"
        )


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
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        for key, value in saved["state"].get(index, {}).items():
            loaded = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)
