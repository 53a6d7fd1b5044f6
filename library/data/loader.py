"""The loader: batches in the order of an epoch, from worker processes without state."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from library.data.dataset import Batch, TrainingDataset
from library.devices import cores_for_this_process
from library.errors import UserError

log = logging.getLogger(__name__)

MAX_BLACK_NAMED = 10  # images with a black mask that get a line each


class EpochSampler(Sampler):
    """Keys (epoch, position) of one process's share of an epoch, from its micro-batch `start` on.

    Process `rank` of `world` takes every world-th batch. If they cannot be divided evenly, the last processes have one less.
    """

    def __init__(self, dataset: TrainingDataset, epoch: int = 1, start: int = 0, rank: int = 0, world: int = 1) -> None:
        self.batches, self.rank, self.world = dataset.num_batches, rank, world
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return len(range(self.rank + self.start * self.world, self.batches, self.world))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start = self.epoch, self.start  # a change for the next epoch must not reach this iteration
        for position in range(self.rank + start * self.world, self.batches, self.world):
            yield epoch, position


class _ErrorsAsItems(Dataset):
    """Returns a UserError as an item: DataLoader puts a traceback into the message of an error that a worker raises."""

    def __init__(self, dataset: TrainingDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Batch | UserError:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def _identity(item: Any) -> Any:
    return item


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; only the trainer handles it, and it ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class EpochLoader:
    """`for batch in loader.epoch(epoch, start=n)`: the batches of an epoch, from micro-batch n of this process on.

    len(loader) is the number of micro-batches in an epoch, the same in all processes. A process that has no batch for the last
    one gets None, since it must take part in the other processes' step. A UserError of a worker is raised here.
    """

    def __init__(
        self, dataset: TrainingDataset, num_workers: int, persistent: bool, pin_memory: bool, rank: int, world: int
    ) -> None:
        self.sampler = EpochSampler(dataset, rank=rank, world=world)
        self.num_workers = min(num_workers, cores_for_this_process())
        self.loader = _data_loader(dataset, self.sampler, self.num_workers, persistent, pin_memory)
        self._black: set[str] = set()

    def __len__(self) -> int:
        return -(-self.sampler.batches // self.sampler.world)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch | None]:
        self.sampler.epoch, self.sampler.start = epoch, start
        for batch in _batches(self.loader):
            self._warn_of_black_masks(batch)
            yield batch
        if start + len(self.sampler) < len(self):
            yield None

    def _warn_of_black_masks(self, batch: Batch) -> None:
        """Warn of images of which nothing is learned: a mask may be black all over, or where the image is cropped."""
        if batch.masks is None or len(self._black) == MAX_BLACK_NAMED:
            return
        counts = batch.masks.flatten(1).any(dim=1).tolist()
        for path, some in zip(batch.paths, counts, strict=True):
            if not some and path not in self._black and len(self._black) < MAX_BLACK_NAMED:
                self._black.add(path)
                log.warning("%s: its mask is black where the image is used, so nothing of it is learned", path)

    def steps(self, epoch: int, start: int, size: int) -> Iterator[Iterator[Batch | None]]:
        """The same in steps of `size` micro-batches; the last step of an epoch may have fewer. Consume each before the next.

        One micro-batch of a step is in memory at a time, besides those that the workers prefetch.
        """
        batches = self.epoch(epoch, start)
        for first in batches:
            yield chain([first], islice(batches, size - 1))


def _data_loader(
    dataset: TrainingDataset, keys: Iterable[tuple[int, int]], num_workers: int, persistent: bool, pin_memory: bool
) -> DataLoader:
    return DataLoader(
        _ErrorsAsItems(dataset),
        batch_size=None,  # an item is a whole batch
        sampler=keys,
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator(),  # else each epoch would take a number from the trainer's generator
        persistent_workers=persistent and num_workers > 0,
    )


def _batches(loader: DataLoader) -> Iterator[Batch]:
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def load_batches(dataset: TrainingDataset, keys: list[tuple[int, int]], num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """The batches of these keys, once. A UserError of a worker is raised here."""
    return _batches(_data_loader(dataset, keys, min(num_workers, cores_for_this_process(), len(keys)), False, pin_memory))


def make_loader(
    dataset: TrainingDataset,
    *,
    num_workers: int = 0,
    persistent: bool = False,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
) -> EpochLoader:
    """num_workers is limited to the number of cores; `persistent` keeps the workers alive between epochs."""
    return EpochLoader(dataset, num_workers, persistent, pin_memory, rank, world)
