"""How long a run is: steps, epochs, and the batches of a step; and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import UserError, counted
from library.training.options import StateOptions, TrainingOptions


@dataclass(frozen=True)
class Plan:
    """How long a run is. An epoch is every batch once; a step is one change of the weights.

    The batches of an epoch are dealt out to the processes in turn, so a micro-batch is one batch for each of them. `processes`
    with `accumulation` micro-batches a step do what one process with `processes * accumulation` batches a step does.
    """

    batches_per_epoch: int
    accumulation: int
    steps_per_epoch: int
    max_steps: int
    epochs: int
    processes: int = 1

    @classmethod
    def of(cls, options: TrainingOptions, batches_per_epoch: int, processes: int = 1) -> Plan:
        """--max_train_epochs beats --max_train_steps; the last step of an epoch may hold fewer batches."""
        accumulation = options.gradient_accumulation_steps
        steps_per_epoch = -(-batches_per_epoch // (accumulation * processes))
        epochs = options.max_train_epochs
        max_steps = epochs * steps_per_epoch if epochs else options.max_train_steps
        return cls(batches_per_epoch, accumulation, steps_per_epoch, max_steps, -(-max_steps // steps_per_epoch), processes)

    @property
    def batches_per_step(self) -> int:
        """Batches of a step over all processes."""
        return self.accumulation * self.processes

    @property
    def micro_batches_per_epoch(self) -> int:
        """Batches of an epoch for each process; the last one may be missing on some."""
        return -(-self.batches_per_epoch // self.processes)

    def first_of_step(self, position: int) -> int:
        """Number in the epoch, over all processes, of the first batch of the step that begins at a process's `position`."""
        return position * self.processes

    def step_size(self, position: int) -> int:
        """Batches, over all processes, of the step that begins at `position`."""
        return min(self.batches_per_step, self.batches_per_epoch - self.first_of_step(position))

    def epoch_of(self, step: int) -> int:
        """The epoch, from 1, to which the step after `step` steps belongs."""
        return step // self.steps_per_epoch + 1


@dataclass(frozen=True)
class Progress:
    """How far a run has come: `step` steps are done, and it goes on at micro-batch `position` of `epoch`."""

    step: int = 0
    epoch: int = 1
    position: int = 0

    @classmethod
    def at_start(cls, options: StateOptions, plan: Plan, resumed: Progress | None) -> Progress:
        """Where the resumed state is, else at --initial_step (or --initial_epoch).

        These two win over the position of a state. With --skip_until_initial_step the data before the step are left out, else its
        epoch starts again. A state of the last step is fine, since the run may have been killed before its last file. Raises
        UserError if nothing is left to do.
        """
        start = resumed or cls()
        step = options.initial_step
        if step is None and options.initial_epoch is not None:
            step = (options.initial_epoch - 1) * plan.steps_per_epoch
        if step is not None and step != start.step:
            position = step % plan.steps_per_epoch * plan.accumulation if options.skip_until_initial_step else 0
            start = cls(step, plan.epoch_of(step), position)
        if start.step > plan.max_steps or (start.step == plan.max_steps and resumed is None):
            raise UserError(
                f"{counted(start.step, 'step')} done and {plan.max_steps:,} asked for in all, so nothing is left to train; "
                "raise --max_train_steps or --max_train_epochs"
            )
        return start

    @property
    def whole_epochs(self) -> int:
        """Epochs that are done."""
        return self.epoch - 1

    def after_step(self, plan: Plan) -> Progress:
        """Where the run is when the next step is done."""
        return Progress(self.step + 1, self.epoch, min(self.position + plan.accumulation, plan.micro_batches_per_epoch))

    def after_epoch(self, plan: Plan) -> Progress:
        """At the beginning of the next epoch, if this one is whole."""
        is_whole = self.position == plan.micro_batches_per_epoch
        return Progress(self.step, self.epoch + 1, 0) if is_whole else self
