"""The loss on held-out images, always at the same noise and timesteps, so that only learning changes it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from library.data.dataset import Batch, TrainingDataset
from library.data.loader import load_batches
from library.diffusion.process import TRAIN_TIMESTEPS
from library.errors import counted
from library.processes import Processes
from library.safe_text import bytes_of
from library.training.options import ValidationOptions
from library.training.randomness import seed_everything, undisturbed

TIMESTEPS = 4  # of each image; the inner points of an even division of their range
EPOCH = 1  # batches of the held-out images are always those of this epoch

# (batch, noise of a shape, timesteps (B,)) -> losses (B,) of the images
LossAt = Callable[[Batch, Callable[[torch.Size], Tensor], Tensor], Tensor]


def validation_timesteps(low: int | None = None, high: int | None = None) -> list[int]:
    """Where between --min_timestep and --max_timestep the loss is measured.

    >>> validation_timesteps()
    [200, 400, 600, 800]
    """
    low, high = low or 0, TRAIN_TIMESTEPS if high is None else high
    return [low + (high - low) * number // (TIMESTEPS + 1) for number in range(1, TIMESTEPS + 1)]


def fixed_noise(seed: int, names: list[str], timestep: int, shape: torch.Size) -> Tensor:
    """N(0, 1) of a shape (B, C, h, w) on the CPU: each image's own, whatever batch it is in, and another at each timestep."""
    parts = []
    for name in names:
        number = hashlib.sha256(bytes_of(f"{seed}/validation/{name}/{timestep}")).digest()[:7]
        parts.append(torch.randn(shape[1:], generator=torch.Generator().manual_seed(int.from_bytes(number, "little"))))
    return torch.stack(parts)


def open_validation(dataset: TrainingDataset) -> TrainingDataset | None:
    """The images held out, if there are any."""
    held_out = dataset.validation()
    if held_out is not None:
        count, batches = int(dataset.table.validated().sum()), counted(held_out.num_batches, "batch", "batches")
        print(f"validation: {count} of {counted(len(dataset.table), 'image')} held out, {batches}")
    return held_out


class Validation:
    """Measures the loss on the images held out. `seed` decides their noise."""

    def __init__(
        self, dataset: TrainingDataset, options: ValidationOptions, device: torch.device, processes: Processes, *, seed: int,
        timesteps: list[int], num_workers: int,
    ) -> None:  # fmt: skip
        self.dataset, self.timesteps, self.num_workers = dataset, timesteps, num_workers
        self.device, self.processes = device, processes
        self.seed = seed if options.validation_seed is None else options.validation_seed
        self.batches = min(dataset.num_batches, options.max_validation_steps or dataset.num_batches)

    def loss(self, loss_at: LossAt) -> float:
        """Mean over images and timesteps, the same number in all processes, which share the batches.

        All generators are left as they were.
        """
        own = self.processes.together(lambda: self._own_losses(loss_at))
        parts = self.processes.gather((own.sum().item(), len(own)))
        return sum(total for total, _ in parts) / sum(count for _, count in parts)

    @torch.no_grad()
    def _own_losses(self, loss_at: LossAt) -> Tensor:
        """Losses at the batches of this process: every world-th."""
        losses = [torch.zeros(0, device=self.device)]
        with undisturbed(self.device):
            keys = [(EPOCH, position) for position in self.processes.share(range(self.batches))]
            for batch in load_batches(self.dataset, keys, self.num_workers, self.device.type == "cuda") if keys else ():
                seed_everything(self.seed, batch.key[1])  # the VAE draws from its posterior, if latents are not cached
                losses += [self._at(loss_at, batch, timestep) for timestep in self.timesteps]
        return torch.cat(losses).cpu().double()

    def _at(self, loss_at: LossAt, batch: Batch, timestep: int) -> Tensor:
        names = [f"{path.replace(chr(92), '/').rpartition('/')[2]}/{batch.size}" for path in batch.paths]
        steps = torch.full((len(names),), timestep, device=self.device)
        return loss_at(batch, lambda shape: fixed_noise(self.seed, names, timestep, shape).to(self.device), steps).float()


@dataclass
class ValidationRecord:
    """The validations of a run. The best is the lowest loss; an equal one later does not replace it."""

    history: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    best: tuple[int, float] | None = None
    without_improvement: int = 0  # validations since the best

    def add(self, step: int, loss: float) -> bool:
        """Note a validation; returns whether it is the best so far. NaN never is."""
        self.history.append((step, loss))
        is_best = not math.isnan(loss) and (self.best is None or loss < self.best[1])
        self.best = (step, loss) if is_best else self.best
        self.without_improvement = 0 if is_best else self.without_improvement + 1
        return is_best

    def is_done_at(self, step: int) -> bool:
        """Whether these weights were validated already."""
        return bool(self.history) and self.history[-1][0] == step

    def is_exhausted(self, patience: int | None) -> bool:
        """Whether --early_stopping_patience ends the run."""
        return patience is not None and self.without_improvement >= patience

    def state(self) -> dict[str, Any]:
        """All of it, as data for JSON."""
        return {"history": self.history, "best": self.best, "without_improvement": self.without_improvement}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.history = [(step, loss) for step, loss in state["history"]]
        self.best = tuple(state["best"]) if state["best"] else None
        self.without_improvement = state["without_improvement"]
