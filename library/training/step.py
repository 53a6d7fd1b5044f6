"""One step of training: forward and backward of its micro-batches, then one change of the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tqdm import tqdm

from library.data.dataset import Batch
from library.training.batch_loss import BatchLoss
from library.training.exchange import StepExchange
from library.training.optimization.optimizers import computes_rates
from library.training.options import TrainingOptions
from library.training.outputs.tracking import describe_nonfinite
from library.training.plan import Plan, Progress
from library.training.randomness import seed_everything
from library.training.run_state.state import State
from library.training.update import StepReport, WeightUpdate


class TrainStep:
    """`report = step(progress, micro_batches)` does the step after `progress`.

    Several processes exchange their gradients in it, and their losses.
    """

    def __init__(
        self, options: TrainingOptions, loss: BatchLoss, update: WeightUpdate, exchange: StepExchange, plan: Plan, seed: int
    ) -> None:
        self.options, self.loss, self.update, self.exchange = options, loss, update, exchange
        self.plan, self.seed, self.losses = plan, seed, exchange.losses
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
        report = self.update.report()
        if has_gradients:
            self.update()
        return self.update.report() if computes_rates(self.update.optimizer) else report  # then they are known only now

    def state(self) -> State:
        """How many batches were skipped."""
        return State(record={"skipped": self.skipped})

    def load_state(self, state: State) -> None:
        """Put back what `state` gave."""
        self.skipped = state.record["skipped"]

    def start_epoch(self, epoch: int) -> None:
        """The network trains; the frozen model (which has no dropout) does so only for gradient checkpointing."""
        model, network = self.loss.model, self.update.network
        network.module.train()
        is_checkpointed = self.options.gradient_checkpointing
        model.denoiser.train(is_checkpointed)
        for encoder in model.text_encoders:
            encoder.train(is_checkpointed and network.trains_text_encoder)
        seed_everything(self.seed, epoch)
        network.module.on_epoch_start(*model.for_networks())

    def _draw_for_the_network(self, progress: Progress) -> None:
        """Let a network that draws something for each step, as DyLoRA its rank, do so: once a step, alike in all processes."""
        hook = getattr(self.update.network.module, "on_step_start", None)
        if hook is not None:
            seed_everything(self.seed, progress.epoch, self.plan.first_of_step(progress.position))
            hook(*self.loss.model.for_networks())

    def _backward(self, progress: Progress, batch: Batch) -> bool:
        """Forward and backward of one batch; its loss is divided by the number of batches in the step. False: it was skipped.

        Random numbers depend on the batch's position in the epoch, not on the process.
        """
        seed_everything(self.seed, *batch.key, 0)
        loss = self.loss(batch)
        if self.options.on_nonfinite_loss == "skip" and not torch.isfinite(loss):
            self.skipped += 1
            tqdm.write(f"skipped a batch: {describe_nonfinite(loss.item(), progress.step + 1, batch.paths)}")
            return False
        if self.exchange.active:
            self.exchange.note_loss(batch.key[1] - self.plan.first_of_step(progress.position), loss)
        else:
            self.losses.add(progress.step + 1, loss, batch.paths)
        self.update.accelerator.backward(loss / self.plan.step_size(progress.position))
        return True

    def _exchange(self, progress: Progress) -> bool:
        """Add up the gradients of all processes. False: there are none, since all batches were skipped."""
        epoch, first = progress.epoch, self.plan.first_of_step(progress.position)
        self.exchange.add_up(progress.step + 1, epoch, first)
        seed_everything(self.seed, epoch, first, 0, 1)  # optimizers that draw numbers draw the same ones in all processes
        return any(parameter.grad is not None for parameter in self.update.network.parameters)
