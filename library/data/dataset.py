"""All datasets of a run as one map from (epoch, position) to a batch.

A batch depends on (seed, epoch, position) alone. So it is the same with any number of loader processes, in any order of
requests, and after a resume. Epochs count from 1, positions from 0.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from library.data import facts
from library.data.cache import NAN_CURE, DiskLatents, EncodeImages, LatentCaching, LatentEncoder, MemoryLatents
from library.data.captions import possible_captions, process_caption
from library.data.config_keys import DatasetConfig
from library.data.holdout import without_augmentation
from library.data.masks import latent_mask
from library.data.order import BatchOrder, EpochOrder
from library.data.pixels import ImageCrop, augmented, centre_crop, decode_crop, read_bytes, read_mask, to_tensor
from library.data.table import build_table
from library.data.text_cache import DiskTexts, MemoryTexts
from library.data.tokens import CaptionTokenizer
from library.models.family import SD_LATENTS, Conditioning, LatentSpace, Tokens

log = logging.getLogger(__name__)

MAX_CAPTIONS_IN_MEMORY = 10_000  # encoded captions that are kept in memory without --cache_text_encoder_outputs


@dataclass
class Batch:
    """Images of one bucket of one dataset. Either `images` or `latents` is set."""

    key: tuple[int, int]  # (epoch, position)
    size: tuple[int, int]  # width, height in pixels
    paths: list[str]
    captions: list[str]  # after shuffling, dropout, ...
    loss_weights: Tensor  # (B,) float32: 1, or prior_loss_weight for regularisation images
    sizes: Tensor  # (B, 6) int64: original height, width; crop's top, left in the resized image; height, width of the batch
    images: Tensor | None = None  # (B, 3, H, W) float32, -1..1
    latents: Tensor | None = None  # (B, C, h, w) float32, not scaled
    tokens: Tokens = field(default_factory=dict)  # see library.models.clip.tokenize; empty without a tokenizer, and with `text`
    text: Conditioning | None = None  # the text encoders' outputs for the captions, if they are cached
    masks: Tensor | None = None  # (B, 1, H/8, W/8) float32, 0..1: weight of the loss; None if no image has a mask

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the DataLoader calls this with pin_memory=True."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        kinds = (Tensor, Conditioning)
        pinned: dict[str, Any] = {name: value.pin_memory() for name, value in values.items() if isinstance(value, kinds)}
        return replace(self, tokens={name: value.pin_memory() for name, value in self.tokens.items()}, **pinned)


@dataclass(frozen=True)
class Use:
    """One use of an image: its processed caption, its pixels (H, W, 3) uint8, its mask (H, W) uint8, and its crop."""

    caption: str
    pixels: np.ndarray
    mask: np.ndarray | None
    crop: ImageCrop


class TrainingDataset(Dataset):
    """Indexes the images of all datasets and builds batches by key.

    `dataset[(epoch, position)]` gives a Batch. `on_bad_image`: see `index_folders`. Without a tokenizer batches hold no tokens.
    `latent_space`: of the model.

    Attributes to set before a loader is made: `world`, the number of processes, each of which takes every world-th batch of an
    epoch; `max_train_steps`, since a token_warmup_step below 1 is a share of it; `texts`, if captions are encoded before.
    """

    world = 1
    max_train_steps = 0
    texts: MemoryTexts | DiskTexts | None = None

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        *,
        seed: int,
        tokenizer: CaptionTokenizer | None = None,
        latent_space: LatentSpace = SD_LATENTS,
        prior_loss_weight: float = 1.0,
        gradient_accumulation_steps: int = 1,
        on_bad_image: str = "refuse",
    ) -> None:
        self.seed = seed
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.table = build_table(datasets, on_bad_image, seed)
        self.loss_weights = np.where(self.table.is_reg(), prior_loss_weight, 1.0).astype(np.float32)
        self.batch_order = BatchOrder(self.table, seed)
        self.latents: MemoryLatents | DiskLatents | None = None
        self.latent_space = latent_space
        self.tokenizer = tokenizer
        if tokenizer is not None:
            tokenizer.warn_of_long(self.table.captions)
        self._last_order: tuple[int, EpochOrder] | None = None

    def validation(self) -> TrainingDataset | None:
        """The held-out images as a dataset without augmentation; None if there are none. It has a latent cache of its own."""
        if not self.table.held_out.any():
            return None
        other = copy.copy(self)
        subsets = [replace(subset, config=without_augmentation(subset.config)) for subset in self.table.subsets]
        other.table = replace(self.table, subsets=subsets, repeats=self.table.validated().astype(np.int32))
        other.loss_weights = np.ones_like(self.loss_weights)
        other.batch_order = BatchOrder(other.table, self.seed)
        other.latents, other._last_order = None, None
        return other

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, over all datasets and processes."""
        return len(self.batch_order)

    def __len__(self) -> int:
        return self.num_batches

    def epoch_order(self, epoch: int) -> EpochOrder:
        """order[position]: rows of `table` that make the batch at that position."""
        if self._last_order is None or self._last_order[0] != epoch:
            self._last_order = (epoch, self.batch_order.of_epoch(epoch))
        return self._last_order[1]

    def paths(self, epoch: int, position: int) -> list[str]:
        """The image files of the batch at this position."""
        return [str(self.table.path(row)) for row in self.epoch_order(epoch)[position].tolist()]

    def step_of(self, epoch: int, position: int) -> int:
        """Optimizer steps before this batch, for token_warmup_step."""
        batches_per_process = -(-self.num_batches // self.world)
        steps_per_epoch = -(-batches_per_process // self.gradient_accumulation_steps)
        return (epoch - 1) * steps_per_epoch + position // self.world // self.gradient_accumulation_steps

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, position = key
        rows = self.epoch_order(epoch)[position].tolist()
        captions, masks, sizes = [], [], []
        images: list[Any] = []  # arrays of pixels or tensors of latents
        for slot, row in enumerate(rows):
            rng = self._random(epoch, position, slot)
            captions.append(self._caption(row, rng, epoch, position))
            image, mask, size = self._image(row, rng)
            images.append(image)
            sizes.append(size)
            masks.append(mask)
        batch = Batch(
            key=(epoch, position),
            size=self.table.bucket_size(rows[0]),
            paths=self.paths(epoch, position),
            captions=captions,
            loss_weights=torch.from_numpy(self.loss_weights[rows]),
            sizes=torch.tensor(sizes),
        )
        if self.latents is None:
            batch.images = to_tensor(images)
        else:
            batch.latents = torch.stack(images)
        if any(mask is not None for mask in masks):
            blank = torch.ones(1, *self.latent_space.size(*batch.size))
            batch.masks = torch.stack([blank if mask is None else mask for mask in masks])
        if self.texts is not None:
            batch.text = self.texts.lookup(captions)
        elif self.tokenizer is not None:
            batch.tokens = self.tokenizer(captions)
        return batch

    def caption(self, epoch: int, position: int, slot: int) -> str:
        """The caption of one image of the batch at this position."""
        row = int(self.epoch_order(epoch)[position][slot])
        return self._caption(row, self._random(epoch, position, slot), epoch, position)

    def use(self, epoch: int, position: int, slot: int) -> Use:
        """The use of one image of the batch at this position, with pixels even if latents are cached.

        Raises UserError if the image cannot be read.
        """
        row = int(self.epoch_order(epoch)[position][slot])
        rng = self._random(epoch, position, slot)
        caption = self._caption(row, rng, epoch, position)
        flipped = self._is_flipped(row, rng)
        pixels, mask, crop = augmented(self.table, row, rng)
        if flipped:
            pixels, mask = pixels[:, ::-1], None if mask is None else mask[:, ::-1]
        return Use(caption, pixels, mask, crop)

    def unchanged(self, row: int) -> Use:
        """An image and its caption as validation uses them. Raises UserError if the image cannot be read."""
        crop, config = centre_crop(self.table, row), without_augmentation(self.table.config(row))
        caption = process_caption(self.table.captions[row], config, random.Random(0), epoch=1, step=0, max_train_steps=0)
        return Use(caption, *decode_crop(crop, read_bytes(crop.path), read_mask(crop)), crop)

    def _random(self, epoch: int, position: int, slot: int) -> random.Random:
        return random.Random(f"{self.seed}/picture/{epoch}/{position}/{slot}")

    def _is_flipped(self, row: int, rng: random.Random) -> bool:
        """Whether the image is flipped. The first random number of an image, so it does not depend on a latent cache."""
        return self.table.config(row).flip_aug and rng.random() < 0.5

    def _caption(self, row: int, rng: random.Random, epoch: int, position: int) -> str:
        return process_caption(
            self.table.captions[row],
            self.table.config(row),
            rng,
            epoch=epoch,
            step=self.step_of(epoch, position),
            max_train_steps=self.max_train_steps,
        )

    def _image(self, row: int, rng: random.Random) -> tuple[Tensor | np.ndarray, Tensor | None, tuple[int, ...]]:
        """Pixels (H, W, 3) uint8 or latents (C, h, w), mask (1, h, w), and the row of `Batch.sizes`."""
        flipped = self._is_flipped(row, rng)
        image: Tensor | np.ndarray
        if self.latents is not None:
            image, mask = self.latents.get(row, flipped)
            crop = centre_crop(self.table, row)
        else:
            pixels, values, crop = augmented(self.table, row, rng)
            image = pixels[:, ::-1] if flipped else pixels
            mask = None if values is None else latent_mask(values, self.latent_space)
        return image, (mask.flip(2) if flipped and mask is not None else mask), crop.sizes(flipped)

    def cache_latents(
        self, encode: EncodeImages, *, batch_size: int, to_disk: bool, fingerprint: str, workers: int | None = None,
        share: tuple[int, int] = (0, 1), gather: Callable[[Any], list[Any]] = lambda value: [value], cure: str = NAN_CURE,
    ) -> None:  # fmt: skip
        """Encode every image once; batches then hold `latents` in place of `images`. Call it before a loader is made.

        `encode(images, seeds)`: (B, 3, H, W) float32 in -1..1 on the CPU and one seed for each image -> (B, C, h, w).
        `fingerprint` stands for all else that decides the result: weights and dtype of the VAE.
        `share`: (rank, world), if several processes share the work; `gather` then gives every process the values of all.
        `cure`: for the error about a VAE whose values are not finite.
        """
        vae = LatentEncoder(encode, fingerprint, self.latent_space, cure)
        caching = LatentCaching(self.table, vae, batch_size=batch_size, to_disk=to_disk, workers=workers, share=share)
        self.latents = caching.run()
        if share[1] > 1:
            self.latents.join(gather)

    def possible_captions(self, limit: int | None = MAX_CAPTIONS_IN_MEMORY) -> dict[str, Path] | None:
        """Every caption that a batch can hold, sorted, with the folder of the first image that has it.

        None if an option changes captions at each use, or if there are more than `limit`.
        """
        found: dict[str, Path] = {}
        for row in np.flatnonzero(self.table.repeats).tolist():
            possible = possible_captions(self.table.captions[row], self.table.config(row))
            if possible is None:
                return None
            for caption in possible:
                found.setdefault(caption, self.table.config(row).image_dir)
            if limit is not None and len(found) > limit:
                log.warning(
                    "there are more than %d different captions, so what the text encoder makes of them is not kept in memory; "
                    "--cache_text_encoder_outputs_to_disk keeps it on disk",
                    limit,
                )
                return None
        return dict(sorted(found.items()))

    def describe(self) -> list[facts.DatasetFacts]:
        """Counts, buckets and tags of each dataset."""
        return facts.describe(self.table)

    def bucket_table(self) -> str:
        """The buckets with their counts, as text to print."""
        return facts.bucket_text(self.describe())
