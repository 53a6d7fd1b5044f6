"""The change of the weights at the end of a step: clipping, optimizer, schedule, limit of norms, average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from library.training.network import TrainedNetwork
from library.training.optimization.ema import ExponentialAverage
from library.training.optimization.optimizers import found_rates
from library.training.run_state.snapshot import load_network, load_optimizer, network_tensors, reject_nonfinite
from library.training.run_state.state import State


@dataclass(frozen=True)
class StepReport:
    """What is known of a step without waiting for the device. Its losses are read later, from the LossRecord.

    rates: the learning rate of each group in this step. found_rates: where the optimizer finds its rates itself, those in force.
    """

    rates: dict[str, float]
    found_rates: dict[str, float]


@dataclass(frozen=True)
class Limits:
    """max_grad_norm: of all gradients together; 0: none. max_weight_norm: of each module of the network; None or 0: none."""

    max_grad_norm: float
    max_weight_norm: float | None


@dataclass
class WeightUpdate:
    """Changes the weights of the network with their gradients.

    optimizer: as accelerate prepared it. in_backward: whether the optimizer steps within the backward pass
    (--fused_backward_pass), so that nothing is left to do for it here.
    """

    accelerator: Accelerator
    network: TrainedNetwork
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    average: ExponentialAverage | None
    limits: Limits
    in_backward: bool = False

    def __call__(self) -> None:
        """One change, which uses up the gradients."""
        if not self.in_backward:
            if self.limits.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.network.parameters, self.limits.max_grad_norm)
            self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.limits.max_weight_norm:
            self.network.module.apply_max_norm_regularization(self.limits.max_weight_norm, self.accelerator.device)
        if self.average is not None:
            self.average.update()

    def report(self) -> StepReport:
        """The rates in force."""
        names = self.network.group_names
        return StepReport(
            dict(zip(names, map(float, self.schedule.get_last_lr()), strict=True)),
            dict(zip(names, found_rates(self.optimizer) or [], strict=False)),
        )

    def state(self) -> State:
        """Network, optimizer, schedule and average. Raises RunFailed if the network holds a NaN."""
        network = network_tensors(self.network.module)
        reject_nonfinite(network)
        state = State(
            tensors={"network": network},
            objects={"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()},
        )
        if self.average is not None:
            state.record["average_updates"] = self.average.updates
            state.tensors["average"] = {str(number): weight for number, weight in enumerate(self.average.weights)}
        if self.accelerator.scaler is not None:
            state.objects["scaler"] = self.accelerator.scaler.state_dict()
        return state

    def load_state(self, state: State) -> None:
        """Put back what `state` gave. Raises UserError if the network has another form."""
        load_network(self.network.module, state.tensors["network"], state.folder)
        if self.average is not None:
            self.average.updates = state.record["average_updates"]
            for number, weight in enumerate(self.average.weights):
                weight.copy_(state.tensors["average"][str(number)])
        load_optimizer(self.optimizer, state.objects["optimizer"])
        self.schedule.load_state_dict(state.objects["schedule"])
        if self.accelerator.scaler is not None and "scaler" in state.objects:
            self.accelerator.scaler.load_state_dict(state.objects["scaler"])
