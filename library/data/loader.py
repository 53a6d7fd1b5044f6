"""The loader: batches of one epoch after the other, from worker processes that hold no state."""

from __future__ import annotations

from collections.abc import Iterator

from library.data.dataset import Batch, TrainingDataset


class EpochLoader:
    """`for batch in loader.epoch(epoch, start=n)`: the batches of an epoch, from micro-batch n of this process on.

    len(loader) is the number of batches a whole epoch has on this process. Errors in a worker arrive as UserError.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        raise NotImplementedError


def make_loader(
    dataset: TrainingDataset,
    *,
    num_workers: int = 0,
    persistent: bool = False,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
) -> EpochLoader:
    """num_workers is cut to the number of cores; `persistent` keeps the workers alive between epochs (nothing with 0)."""
    raise NotImplementedError
