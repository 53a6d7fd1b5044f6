"""Random generators: seeded from the run's seed and the position in the run, saved, and restored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, *salt: int) -> None:
    """Set torch's and Python's generators from the seed and, for example, the number of a batch, whatever was drawn before."""
    mixed = random.Random(f"{seed}/{'/'.join(map(str, salt))}").getrandbits(63)
    random.seed(mixed)
    torch.manual_seed(mixed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a run may draw from, as what torch.load reads safely."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """After the block all generators are as they were before it."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)
