"""The losses and learning rates of a run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from library.errors import RunFailed


class AsyncValues:
    """Copies values from the device without waiting. `values` waits for this copy, not for work that was queued later."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._arrived = tensor.detach(), None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(self._tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> list[float]:
        """The values of a tensor of one dimension."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor.tolist()


class PendingLoss:
    """The loss of one batch, which is read later."""

    def __init__(self, step: int, loss: torch.Tensor, paths: list[str]) -> None:
        self.step, self.paths = step, paths
        self._loss = AsyncValues(loss.reshape(1))

    def read(self) -> Iterator[tuple[int, float, list[str]]]:
        """(step, loss, images)"""
        yield self.step, self._loss.values()[0], self.paths


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step: `current`, the mean over its batches; `average`, that over an epoch's worth of batches at its end."""

    current: float
    average: float


class PendingLosses(Protocol):
    """Losses of a step that are read later."""

    step: int

    def read(self) -> Iterator[tuple[int, float, list[str]]]: ...


@dataclass
class LossRecord:
    """Losses of a run. Each is fetched from the device one batch late, so that training never waits for it.

    window: how many of the last losses `average` is the mean of: the batches of an epoch.
    """

    window: int
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    rates: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # group -> (step, learning rate), where it changed
    explain: Callable[[], str] | None = None  # why a loss is not finite
    _pending: PendingLosses | None = None

    def __post_init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=max(1, self.window))
        self._sum = 0.0
        self._by_step: dict[int, tuple[list[float], float]] = {}  # losses and average at its end, of steps not taken yet

    def add(self, step: int, loss: torch.Tensor, paths: list[str]) -> None:
        """Hand over the loss of one batch; the one before it is read. Raises RunFailed if that is not finite."""
        self.expect(PendingLoss(step, loss, paths))

    def expect(self, pending: PendingLosses) -> None:
        """Hand over losses; those before them are read. Raises RunFailed if one of those is not finite."""
        self.flush()
        self._pending = pending

    def flush(self) -> None:
        """Read what still waits."""
        pending, self._pending = self._pending, None
        for step, value, paths in pending.read() if pending else ():
            self._record(step, value, paths)

    def _record(self, step: int, value: float, paths: list[str]) -> None:
        if not math.isfinite(value):
            why = f" ({self.explain()})" if self.explain else ""
            raise RunFailed(describe_nonfinite(value, step, paths) + why)
        if len(self._recent) == self._recent.maxlen:
            self._sum -= self._recent[0]
        self._recent.append(value)
        self._sum += value
        self.steps.append(step)
        self.values.append(value)
        of_step, _ = self._by_step.get(step, ([], 0.0))
        self._by_step[step] = ([*of_step, value], self._sum / len(self._recent))

    def take(self, step: int) -> StepLoss | None:
        """The loss of a step that is done, once; None if all its batches were skipped. Waits if it has not arrived yet."""
        if self._pending is not None and self._pending.step <= step:
            self.flush()
        if step not in self._by_step:
            return None
        values, average = self._by_step.pop(step)
        return StepLoss(sum(values) / len(values), average)

    def add_rates(self, step: int, rates: Mapping[str, float]) -> None:
        """The learning rates, by group, with which a step was done."""
        for name, rate in rates.items():
            rate = float(rate)  # AdaFactor's own are tensors
            points = self.rates.setdefault(name, [])
            if not points or points[-1][1] != rate:
                points.append((step, rate))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that was read, as tensors and as data for JSON."""
        tensors = {"steps": torch.tensor(self.steps, dtype=torch.int64), "values": torch.tensor(self.values, dtype=torch.float64)}
        return tensors, {"sum": self._sum, "recent": len(self._recent), "rates": self.rates}

    def load_state(self, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.steps, self.values = tensors["steps"].tolist(), tensors["values"].tolist()
        self._recent.clear()
        self._recent.extend(self.values[len(self.values) - record["recent"] :])
        self._sum = record["sum"]
        self.rates = {name: [(step, rate) for step, rate in points] for name, points in record["rates"].items()}

    def shown(self) -> dict[str, str]:
        """The newest loss that was read and the average, for the progress bar."""
        return {"loss": f"{self.current:.4f}", "average": f"{self.average:.4f}"} if self.values else {}

    @property
    def smoothing(self) -> int:
        """Batches over which a plot averages: those of an epoch, at least 20, but no more than leave a first epoch a curve."""
        return shortened(max(20, self.window), len(self.values))

    @property
    def current(self) -> float | None:
        """The newest loss that was read."""
        return self.values[-1] if self.values else None

    @property
    def average(self) -> float | None:
        """Mean over the last epoch's worth of batches."""
        return self._sum / len(self._recent) if self._recent else None


def shortened(width: int, count: int) -> int:
    """The width of a running mean over `count` values, of which a curve is left: at most a quarter of them."""
    return max(1, min(width, count // 4))


def describe_nonfinite(value: float, step: int, paths: list[str]) -> str:
    """One line on a loss of NaN or infinity: where, which images, what to do."""
    images = ", ".join(paths)
    return (
        f"the loss is {value} at step {step} (images: {images}); nothing was saved after it. Lower --learning_rate, use "
        "--mixed_precision bf16 or no, or skip such batches with --on_nonfinite_loss skip"
    )
