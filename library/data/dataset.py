"""All datasets of a run as one map from (epoch, position) to a batch.

A batch depends on (seed, epoch, position) alone, never on what was asked for before, so it is the same with any
number of loader processes, in any order, and after a resume. Epochs count from 1, positions from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from library.data.config import DatasetConfig

EncodeImages = Callable[[Tensor, "list[int]"], Tensor]


@dataclass
class Batch:
    """Pictures of one bucket of one dataset. Either `images` or `latents` is set."""

    key: tuple[int, int]  # (epoch, position)
    size: tuple[int, int]  # width, height in pixels
    paths: list[str]
    captions: list[str]  # after shuffling, dropout, ...
    loss_weights: Tensor  # (B,) float32: 1, or prior_loss_weight for regularisation pictures
    images: Tensor | None = None  # (B, 3, H, W) float32, -1..1
    latents: Tensor | None = None  # (B, 4, H/8, W/8) float32, not scaled
    input_ids: Tensor | None = None  # (B, chunks, 77) int64; None without a tokenizer
    token_weights: Tensor | None = None  # (B, chunks, 77) float32; only with weighted_captions

    def pin_memory(self) -> Batch:
        """Called by the DataLoader with pin_memory=True."""
        raise NotImplementedError


class TrainingDataset(Dataset):
    """Indexes the pictures of all datasets and builds batches by key.

    `dataset[(epoch, position)]` gives a Batch. `max_train_steps` (for token_warmup_step below 1) may be set later,
    but before a loader is made.
    """

    num_batches: int  # a whole epoch, all datasets
    max_train_steps: int

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        *,
        seed: int,
        tokenizer: Any | None = None,
        max_token_length: int | None = None,
        weighted_captions: bool = False,
        prior_loss_weight: float = 1.0,
        max_train_steps: int = 0,
        gradient_accumulation_steps: int = 1,
        world: int = 1,
        on_bad_image: str = "refuse",
    ) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        raise NotImplementedError

    def epoch_order(self, epoch: int) -> list:
        """Picture numbers of every batch of an epoch, in training order."""
        raise NotImplementedError

    def cache_latents(
        self, encode: EncodeImages, *, batch_size: int, to_disk: bool, fingerprint: str, workers: int | None = None
    ) -> None:
        """Encode every picture once; batches then hold `latents` in place of `images`.

        `encode(images, seeds)`: (B, 3, H, W) float32 in -1..1 on the CPU and one seed a picture -> (B, 4, H/8, W/8).
        `fingerprint` names whatever else decides the result: weights and dtype of the VAE.
        """
        raise NotImplementedError

    def caption_variants(self, limit: int = 10_000) -> list[str] | None:
        """Every caption that a batch can hold, if there are finitely many and at most `limit`; else None."""
        raise NotImplementedError

    def describe(self) -> list:
        """One library.data.facts.DatasetFacts a dataset: counts, buckets, tags."""
        raise NotImplementedError

    def bucket_table(self) -> str:
        """The buckets with their counts, as text for the screen."""
        raise NotImplementedError
