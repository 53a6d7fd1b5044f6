"""When the loss on held-out images is measured, and what follows from it: the best file, lower rates, an early end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from tqdm import tqdm

from library.models.modules import evaluating
from library.training.loop import Listener, Stop
from library.training.optimization.schedules import OnPlateau
from library.training.options import ValidationOptions
from library.training.outputs.saves import SavedWeights
from library.training.outputs.trackers import Tracker
from library.training.plan import Progress
from library.training.run_state.state import State
from library.training.step import TrainStep
from library.training.update import StepReport
from library.training.validation import Validation, ValidationRecord


class Validator(Listener):
    """Validates as --validate_every_n_steps and --validate_every_n_epochs ask for, and the last weights in any case.

    validation: None if no images are held out; then nothing happens. eval_weights: within it the network holds what is saved.
    """

    def __init__(
        self, options: ValidationOptions, validation: Validation | None, step: TrainStep,
        eval_weights: Callable[[], AbstractContextManager], weights: SavedWeights, tracker: Tracker,
    ) -> None:  # fmt: skip
        self.options, self.validation, self.step = options, validation, step
        self.eval_weights, self.weights, self.tracker = eval_weights, weights, tracker
        self.record = ValidationRecord()

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """After every --validate_every_n_steps steps."""
        if self.is_due_after_step(progress.step):
            self.validate(progress.step, progress.whole_epochs, "step", progress.step)

    def after_epoch(self, progress: Progress, epoch: int) -> None:
        """After every --validate_every_n_epochs (unset: 1) whole epochs."""
        if progress.whole_epochs == epoch and self.is_due_after_epoch(epoch):
            self.validate(progress.step, epoch - 1, "epoch", epoch)  # counts as within the epoch, as files named for a step do

    def at_end(self, progress: Progress, stop: Stop) -> None:
        """The weights that are saved as the result."""
        if stop is not Stop.INTERRUPTED and not self.record.is_done_at(progress.step):
            self.validate(progress.step, progress.whole_epochs, "step", progress.step)

    def is_due_after_step(self, step: int) -> bool:
        """Whether --validate_every_n_steps asks for it."""
        every = self.options.validate_every_n_steps
        return bool(every and step % every == 0)

    def is_due_after_epoch(self, epoch: int) -> bool:
        """Whether --validate_every_n_epochs (unset: 1) asks for it."""
        return epoch % (self.options.validate_every_n_epochs or 1) == 0

    def validate(self, step: int, epochs: int, kind: str, number: int) -> None:
        """Measure the loss, once for the same weights, and save the best ones. kind, number: how it is logged."""
        if self.validation is None:
            return
        if not self.record.is_done_at(step):
            loss = self._measure(self.validation)
            is_best = self.record.add(step, loss)
            if isinstance(self.step.update.schedule, OnPlateau):
                self.step.update.schedule.validated(loss)
            tqdm.write(f"validation after step {step}: {loss:.5f}{', the best so far' if is_best else ''}")
            if is_best:
                self.weights.save(self.weights.files.best_path(), step, epochs)
        self.weights.losses.flush()
        self.tracker.log_validation(kind, number, self.record.history[-1][1], self.weights.losses)

    def wants_to_stop(self) -> bool:
        """Whether --early_stopping_patience ends the run."""
        return self.record.is_exhausted(self.options.early_stopping_patience)

    def state(self) -> State:
        """All validations until now."""
        return State(record={"validations": self.record.state()})

    def load_state(self, state: State) -> None:
        """Put back what `state` gave."""
        self.record.load_state(state.record["validations"])

    def _measure(self, validation: Validation) -> float:
        started = time.perf_counter()
        loss_of, network = self.step.loss, self.step.update.network
        model = loss_of.model
        with self.eval_weights(), evaluating(network.module, model.denoiser, *model.text_encoders):
            loss = validation.loss(loss_of.unweighted)
        self.seconds += time.perf_counter() - started
        return loss
