"""What both trainings share: the learning rate's course, averaged weights, and checkpoints to go on from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from library.files import atomic_write


def rate_at(step: int, steps: int, peak: float, warm_up: int = 100) -> float:
    """The learning rate rises evenly to `peak`, then falls like a cosine to 2 % of it at the end."""
    falling = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return peak * min(1.0, (step + 1) / warm_up) * falling


class Average:
    """Weights averaged over the last steps (EMA), which draw better than the latest. Early on the span is short."""

    def __init__(self, modules: Iterable[nn.Module], decay: float) -> None:
        self.modules = list(modules)
        self.averages = [copy.deepcopy(module).eval().requires_grad_(False) for module in self.modules]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for average, module in zip(self.averages, self.modules, strict=True):
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), weight)


class Checkpoint:
    """One file with all that a training needs to go on: weights, averages, optimizer, step, random state."""

    def __init__(self, path: Path, average: Average, optimizer: torch.optim.Optimizer) -> None:
        self.path, self.average, self.optimizer = path, average, optimizer

    def save(self, step: int) -> None:
        state = {
            "modules": [module.state_dict() for module in self.average.modules],
            "averages": [module.state_dict() for module in self.average.averages],
            "optimizer": self.optimizer.state_dict(),
            "step": step,
            "random": torch.get_rng_state(),
        }
        with atomic_write(self.path) as temporary:
            torch.save(state, temporary)

    def load(self) -> int:
        """The number of steps that are done: 0 where there is no checkpoint."""
        if not self.path.is_file():
            return 0
        state = torch.load(self.path, weights_only=True)
        for modules, states in ((self.average.modules, state["modules"]), (self.average.averages, state["averages"])):
            for module, weights in zip(modules, states, strict=True):
                module.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        return state["step"]


def clip_and_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Cut the gradients to norm 1 and do one step at this rate."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
