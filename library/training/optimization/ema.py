"""Averaged weights, which are validated, drawn with and saved instead of the newest ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from library.errors import UserError
from library.training.optimization.optimizers import averaged_weights, averages_weights
from library.training.options import ValidationOptions


class ExponentialAverage:
    """Exponential moving average of the trained weights, in float32 on their device.

    After its nth update, average = d * average + (1 - d) * weights with d = min(decay, (1 + n) / (10 + n)): at the beginning
    the average follows quickly, so that the zeros from which a LoRA starts are soon forgotten.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.weights = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Average in the present weights; the host does not wait for the device."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.weights, [p.detach().float() for p in self.parameters], 1 - decay)


def make_average(
    options: ValidationOptions, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> ExponentialAverage | None:
    """The average that --ema_decay asks for. UserError for an optimizer that averages by itself."""
    if options.ema_decay is None:
        return None
    if averages_weights(optimizer):
        raise UserError("--ema_decay: a schedule-free optimizer averages the weights by itself; leave out --ema_decay")
    return ExponentialAverage(parameters, options.ema_decay)


@contextmanager
def eval_weights(optimizer: torch.optim.Optimizer, average: ExponentialAverage | None) -> Iterator[None]:
    """Within the block the parameters hold the EMA or the schedule-free average; afterwards the trained weights, bit for bit.

    The eval weights are those that are validated, used for previews and saved.
    """
    with averaged_weights(optimizer):
        if average is None:
            yield
            return
        parameters = [p.detach() for p in average.parameters]
        before = [p.clone() for p in parameters]
        try:
            torch._foreach_copy_(parameters, average.weights)
            yield
        finally:
            torch._foreach_copy_(parameters, before)
