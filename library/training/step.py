"""One step of training: forward and backward of its micro-batches, then one change of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from tqdm import tqdm

from library.data.dataset import Batch
from library.training.batch_loss import BatchLoss
from library.training.exchange import StepExchange
from library.training.network import TrainedNetwork
from library.training.optimization.ema import ExponentialAverage
from library.training.optimization.optimizers import found_rates
from library.training.optimization.schedules import finds_rates_in_step
from library.training.options import TrainNetworkOptions
from library.training.outputs.tracking import LossRecord, describe_nonfinite
from library.training.plan import Plan, Progress
from library.training.randomness import seed_everything
from library.training.run_state.snapshot import load_network, load_optimizer, network_tensors, refuse_nonfinite
from library.training.run_state.state import State


@dataclass(frozen=True)
class StepReport:
    """What is known of a step without waiting for the device. Its losses are read later, from the LossRecord.

    rates: the learning rate of each group in this step. found_rates: where the optimizer finds its rates itself, those in force.
    """

    rates: dict[str, float]
    found_rates: dict[str, float]


class TrainStep:
    """`report = step(progress, micro_batches)` does the step after `progress`.

    Several processes exchange their gradients in it, and their losses. paths(epoch, position) names the images of a batch.
    """

    def __init__(
        self, options: TrainNetworkOptions, accelerator: Accelerator, *, loss: BatchLoss, network: TrainedNetwork,
        optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, average: ExponentialAverage | None,
        exchange: StepExchange, losses: LossRecord, plan: Plan, seed: int, paths: Callable[[int, int], list[str]],
    ) -> None:  # fmt: skip
        self.options, self.accelerator, self.loss, self.network = options, accelerator, loss, network
        self.optimizer, self.schedule, self.average, self.exchange = optimizer, schedule, average, exchange
        self.losses, self.plan, self.seed, self.paths = losses, plan, seed, paths
        self.skipped = 0  # batches whose loss was not finite

    def __call__(self, progress: Progress, micro_batches: Iterable[Batch | None]) -> StepReport:
        """None among the micro-batches: this process has no batch left, but takes part in the step of the others."""
        has_gradients = False
        for index, batch in enumerate(micro_batches):
            if index == 0:
                self._draw_for_the_network(progress)
            if batch is not None:
                has_gradients |= self._backward(progress, batch)
        if self.exchange.active:
            has_gradients = self._exchange(progress)
        report = self._report()
        if has_gradients:
            self._update()
        return self._report() if finds_rates_in_step(self.optimizer) else report

    def state(self) -> State:
        """Network, optimizer, schedule and average. Raises RunFailed if the network holds a NaN."""
        network = network_tensors(self.network.module)
        refuse_nonfinite(network)
        state = State(
            record={"skipped": self.skipped},
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
        self.skipped = state.record["skipped"]

    def start_epoch(self, epoch: int) -> None:
        """The network trains; the frozen model (which has no dropout) does so only for gradient checkpointing."""
        model, module = self.loss.model, self.network.module
        module.train()
        is_checkpointed = self.options.training.gradient_checkpointing
        model.denoiser.train(is_checkpointed)
        for encoder in model.text_encoders:
            encoder.train(is_checkpointed and self.network.trains_text_encoder)
        seed_everything(self.seed, epoch)
        module.on_epoch_start(*model.for_networks())

    def _draw_for_the_network(self, progress: Progress) -> None:
        """Let a network that draws something for each step, as DyLoRA its rank, do so: once a step, alike in all processes."""
        hook = getattr(self.network.module, "on_step_start", None)
        if hook is not None:
            seed_everything(self.seed, progress.epoch, self.plan.first_of_step(progress.position))
            hook(*self.loss.model.for_networks())

    def _backward(self, progress: Progress, batch: Batch) -> bool:
        """Forward and backward of one batch; its loss is divided by the number of batches in the step. False: it was skipped.

        Random numbers depend on the batch's place in the epoch, not on the process.
        """
        seed_everything(self.seed, *batch.key, 0)
        loss = self.loss(batch)
        if self.options.training.on_nonfinite_loss == "skip" and not torch.isfinite(loss):
            self.skipped += 1
            tqdm.write(f"skipped a batch: {describe_nonfinite(loss.item(), progress.step + 1, batch.paths)}")
            return False
        if self.exchange.active:
            self.exchange.note_loss(batch.key[1] - self.plan.first_of_step(progress.position), loss)
        else:
            self.losses.add(progress.step + 1, loss, batch.paths)
        self.accelerator.backward(loss / self.plan.step_size(progress.position))
        return True

    def _exchange(self, progress: Progress) -> bool:
        """Add up the gradients of all processes. False: there are none, since all batches were skipped."""
        epoch, first = progress.epoch, self.plan.first_of_step(progress.position)
        self.exchange.add_up(progress.step + 1, lambda slot: self.paths(epoch, first + slot))
        seed_everything(self.seed, epoch, first, 0, 1)  # optimizers that draw numbers draw the same ones in all processes
        return any(parameter.grad is not None for parameter in self.network.parameters)

    def _report(self) -> StepReport:
        names = self.network.group_names
        return StepReport(
            dict(zip(names, map(float, self.schedule.get_last_lr()), strict=True)),
            dict(zip(names, found_rates(self.optimizer) or [], strict=False)),
        )

    def _update(self) -> None:
        """Change the weights with the gradients of this step."""
        options = self.options.optimizer
        if not options.fused_backward_pass:  # else the backward pass has done it
            if options.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.network.parameters, options.max_grad_norm)
            self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.options.network.scale_weight_norms:
            self.network.module.apply_max_norm_regularization(self.options.network.scale_weight_norms, self.accelerator.device)
        if self.average is not None:
            self.average.update()
