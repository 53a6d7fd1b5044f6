"""How long a run is: steps, epochs, and the batches of a step."""

from __future__ import annotations

from dataclasses import dataclass

from library.training.options import TrainNetworkOptions


@dataclass(frozen=True)
class Plan:
    """How long a run is. An epoch is every batch once; a step is one change of the weights."""

    batches_per_epoch: int
    accumulation: int
    steps_per_epoch: int
    max_steps: int
    epochs: int

    @classmethod
    def of(cls, options: TrainNetworkOptions, batches_per_epoch: int) -> Plan:
        """--max_train_epochs beats --max_train_steps; the last step of an epoch may hold fewer batches."""
        accumulation = options.training.gradient_accumulation_steps
        steps_per_epoch = -(-batches_per_epoch // accumulation)
        epochs = options.training.max_train_epochs
        max_steps = epochs * steps_per_epoch if epochs else options.training.max_train_steps
        return cls(batches_per_epoch, accumulation, steps_per_epoch, max_steps, -(-max_steps // steps_per_epoch))

    def group_size(self, position: int) -> int:
        """Batches in the step to which the batch at this position of an epoch belongs."""
        start = position - position % self.accumulation
        return min(self.accumulation, self.batches_per_epoch - start)

    def starts_step(self, position: int) -> bool:
        """Whether the batch at this position is the first one of its step."""
        return position % self.accumulation == 0

    def ends_step(self, position: int) -> bool:
        """Whether the weights change after the batch at this position."""
        return (position + 1) % self.accumulation == 0 or position + 1 == self.batches_per_epoch
