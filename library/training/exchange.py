"""One step in several processes: their gradients are added up, so that the weights change alike in all of them.

P processes with A batches each do what one process with P * A batches a step does: the same batches (dealt out in turn), the
same noise (seeded by the batch's position in the epoch), the same divisor. Only the order of additions differs, and so rounding.
The network is small, so its gradients travel in one buffer, together with the losses and with whether somebody asks to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from library.processes import EndedElsewhere, Processes, lost_process
from library.training.outputs.tracking import AsyncValues, LossRecord


class StepResult:
    """The sums of a step, being copied from the device. `read` waits for them.

    paths(slot) names the images of one of its batches.
    """

    def __init__(self, tail: torch.Tensor, step: int, slots: int, paths: Callable[[int], list[str]]) -> None:
        self.step, self.slots, self.paths = step, slots, paths
        self._tail = AsyncValues(tail)
        self.stop = self.failed = False

    def read(self) -> Iterator[tuple[int, float, list[str]]]:
        """(step, loss, images) of every batch of the step, in the order of one process."""
        values = self._tail.values()
        losses, seen, (stop, failed) = values[: self.slots], values[self.slots : -2], values[-2:]
        self.stop, self.failed = stop > 0, failed > 0
        for slot, (loss, is_there) in enumerate(zip(losses, seen, strict=True)):
            if is_there:
                yield self.step, loss, self.paths(slot)


class StepExchange:
    """Sums gradients over the processes. Alone it does nothing.

    slots: batches of a step over all processes. paths(epoch, position) names the images of a batch, for error messages.
    """

    def __init__(
        self, processes: Processes, parameters: Sequence[torch.nn.Parameter], slots: int, losses: LossRecord,
        paths: Callable[[int, int], list[str]],
    ) -> None:  # fmt: skip
        self.processes, self.parameters, self.slots, self.losses = processes, list(parameters), slots, losses
        self.paths = paths
        self.active = processes.world > 1
        self.asked_to_stop: Callable[[], bool] = lambda: False  # whether this process was asked to
        self._stop = False
        self._last: StepResult | None = None
        if self.active:
            sizes = [parameter.numel() for parameter in self.parameters]
            self._gradient_values, self._sizes = sum(sizes), sizes
            length = self._gradient_values + len(sizes) + 2 * slots + 2
            self._buffer = torch.zeros(length, dtype=torch.float32, device=self.parameters[0].device)
            processes.before_exchange = self.check

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the buffer: gradients, one flag for each parameter that has one, losses and flags."""
        return self._buffer.split([self._gradient_values, len(self._sizes), 2 * self.slots + 2])

    def note_loss(self, slot: int, loss: torch.Tensor) -> None:
        """Keep the loss of one of this process's batches for the sum."""
        tail = self._parts()[2]
        tail[slot] = loss.detach()
        tail[self.slots + slot] = 1

    def add_up(self, step: int, epoch: int, first: int) -> None:
        """Replace the gradients by their sums over all processes; whether this one was asked to stop travels with them.

        first: position in the epoch, over all processes, of the first batch of the step.
        """
        if not self.active:
            return
        self.check()
        self._fill(stop=self.asked_to_stop())
        self._all_reduce(step, lambda slot: self.paths(epoch, first + slot))
        self._take()
        self._parts()[2].zero_()

    def stopping(self) -> bool:
        """Whether all stop now: alone as soon as it was asked to; else when all know, which is a step later."""
        return self._stop if self.active else self.asked_to_stop()

    def finish(self) -> None:
        """After the last step: learn whether another process failed in or behind it."""
        if self.active:
            self.check()
            self._fill()
            self._all_reduce(0, lambda slot: [])
        self.check()

    def fail(self) -> None:
        """Take part in the step of the others with the flag `failed`, unless they know already."""
        if self.active and not (self._last and self._last.failed):
            for parameter in self.parameters:
                parameter.grad = None
            self._parts()[2].zero_()
            self._fill(failed=True)
            self._all_reduce(0, lambda slot: []).failed = True

    def check(self) -> None:
        """Read the result of the last step. Raises EndedElsewhere if another process failed in it."""
        self.losses.flush()
        if self._last is not None:
            self._stop = self._last.stop
            if self._last.failed:
                raise EndedElsewhere("another process failed", 1)

    def _fill(self, *, stop: bool = False, failed: bool = False) -> None:
        gradients, flags, tail = self._parts()
        gradients.zero_()
        pairs = [
            (part, p.grad.reshape(-1))
            for part, p in zip(gradients.split(self._sizes), self.parameters, strict=True)
            if p.grad is not None
        ]
        if pairs:
            torch._foreach_copy_([part for part, _ in pairs], [gradient for _, gradient in pairs])
        flags.copy_(torch.tensor([float(p.grad is not None) for p in self.parameters]), non_blocking=True)
        tail[-2:] = torch.tensor([float(stop), float(failed)])

    def _all_reduce(self, step: int, paths: Callable[[int], list[str]]) -> StepResult:
        try:
            dist.all_reduce(self._buffer)
        except RuntimeError as error:
            raise lost_process(error) from error
        self._last = StepResult(self._parts()[2].clone(), step, self.slots, paths)
        self.losses.expect(self._last)
        return self._last

    def _take(self) -> None:
        """Give each parameter its sum. One without a gradient in any process keeps none, so that the optimizer skips it."""
        gradients, flags, _ = self._parts()
        lacking = any(parameter.grad is None for parameter in self.parameters)
        present = flags.tolist() if lacking else [1.0] * len(self._sizes)  # tolist waits for the device
        for part, is_there, parameter in zip(gradients.split(self._sizes), present, self.parameters, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype, copy=True) if is_there else None
