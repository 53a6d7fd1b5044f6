"""What a run tells while it runs: losses, TensorBoard values, the loss plot."""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from library.errors import RunFailed, UserError
from library.files import atomic_write
from library.training.options import LogOptions


class PendingLoss:
    """A loss on its way from the device; `item` waits for its own arrival, not for work that was queued after it."""

    def __init__(self, step: int, value: torch.Tensor, paths: list[str]) -> None:
        self.step, self.paths = step, paths
        self._value, self._arrived = value.detach(), None
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(self._value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def item(self) -> float:
        """The loss as a number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value.item()


@dataclass
class LossRecord:
    """Losses of a run. Each is fetched from the device one batch late, so that training never waits for it.

    window: batches of an epoch; `average` is the mean over the last so many.
    """

    window: int
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    explain: Callable[[], str] | None = None  # why a loss is not finite
    _pending: PendingLoss | None = None

    def __post_init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=max(1, self.window))
        self._sum = 0.0

    def add(self, step: int, loss: torch.Tensor, paths: list[str]) -> None:
        """Hand over the loss of one batch; the one before it is read. Raises RunFailed if that is not finite."""
        self.flush()
        self._pending = PendingLoss(step, loss, paths)

    def flush(self) -> None:
        """Read the loss that still waits."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        value = pending.item()
        if value != value or value in (float("inf"), float("-inf")):
            why = f" ({self.explain()})" if self.explain else ""
            raise RunFailed(describe_nonfinite(value, pending.step, pending.paths) + why)
        if len(self._recent) == self._recent.maxlen:
            self._sum -= self._recent[0]
        self._recent.append(value)
        self._sum += value
        self.steps.append(pending.step)
        self.values.append(value)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that was read, as tensors and as data for JSON."""
        tensors = {"steps": torch.tensor(self.steps, dtype=torch.int64), "values": torch.tensor(self.values, dtype=torch.float64)}
        return tensors, {"sum": self._sum, "recent": len(self._recent)}

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.steps, self.values = tensors["steps"].tolist(), tensors["values"].tolist()
        self._recent.clear()
        self._recent.extend(self.values[len(self.values) - numbers["recent"] :])
        self._sum = numbers["sum"]

    @property
    def current(self) -> float | None:
        """The newest loss that was read."""
        return self.values[-1] if self.values else None

    @property
    def average(self) -> float | None:
        """Mean over the last epoch's worth of batches."""
        return self._sum / len(self._recent) if self._recent else None


def describe_nonfinite(value: float, step: int, paths: list[str]) -> str:
    """One line on a loss of NaN or infinity: where, which pictures, what to do."""
    pictures = ", ".join(paths)
    return (
        f"the loss is {value} at step {step} (pictures: {pictures}); nothing was saved after it. Lower --learning_rate, use "
        "--mixed_precision bf16 or no, or skip such batches with --on_nonfinite_loss skip"
    )


class Tracker:
    """TensorBoard through accelerate; does nothing without --logging_dir.

    Tags: loss/current, loss/average, lr/<group>, lr/d*lr/<group> by step; loss/epoch_average by epoch; sample pictures.
    """

    def __init__(self, accelerator: Accelerator, options: LogOptions) -> None:
        self.accelerator = accelerator
        self.active = bool(options.logging_dir)
        if self.active:
            accelerator.init_trackers(options.log_tracker_name or "network_train")

    def log_step(
        self, step: int, losses: LossRecord, rates: list[float], names: list[str], found_rates: list[float] | None = None
    ) -> None:
        """Values after an optimizer step; the loss is that of the newest batch that was read.

        `found_rates`: the rates in force where the optimizer finds them by itself.
        """
        if not self.active:
            return
        values = {f"lr/{name}": rate for name, rate in zip(names, rates, strict=True)}
        values |= {f"lr/d*lr/{name}": rate for name, rate in zip(names, found_rates or [])}
        if losses.current is not None:
            values |= {"loss/current": losses.current, "loss/average": losses.average}
        self.accelerator.log(values, step=step)

    def log_epoch(self, epoch: int, losses: LossRecord) -> None:
        """The mean loss over the epoch."""
        if self.active and losses.average is not None:
            self.accelerator.log({"loss/epoch_average": losses.average}, step=epoch)

    def log_validation(self, name: str, at: int, loss: float, losses: LossRecord) -> None:
        """A validation's loss by step or by epoch (`name`), and how far it is above that of training."""
        if self.active:
            tags = {f"loss/validation/{name}_average": loss}
            if losses.average is not None:
                tags[f"loss/validation/{name}_divergence"] = loss - losses.average
            self.accelerator.log(tags, step=at)

    def log_pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Sample pictures by tag."""
        if not self.active:
            return
        arrays = {tag: np.asarray(picture)[None] for tag, picture in pictures.items()}
        for tracker in self.accelerator.trackers:
            tracker.log_images(arrays, step=step, dataformats="NHWC")

    def finish(self) -> None:
        """Write out what is buffered."""
        if self.active:
            self.accelerator.end_training()


def logging_folder(options: LogOptions) -> str | None:
    """`<logging_dir>/<log_prefix><time>`; None without --logging_dir."""
    if not options.logging_dir:
        return None
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--logging_dir needs the package 'tensorboard'; run: pip install tensorboard")
    folder = Path(options.logging_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--logging_dir {folder} cannot be made: {error.strerror}; choose another folder") from error
    return str(folder / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}")


def write_loss_plot(record: LossRecord, path: Path, title: str) -> None:
    """A picture of the loss over the steps: each batch pale, the running mean over an epoch (at least 20 batches) strong."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), dpi=110)
    axes.plot(record.steps, record.values, color="#9ecae1", linewidth=0.8, label="each batch")
    width = min(len(record.values), max(20, record.window))
    if width > 1:
        values = torch.tensor(record.values, dtype=torch.float64)
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), values.cumsum(0)])
        means = (sums[width:] - sums[:-width]) / width
        axes.plot(record.steps[width - 1 :], means, color="#08519c", linewidth=1.8, label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
    pyplot.close(figure)
