"""All datasets of a run as one map from (epoch, position) to a batch.

A batch depends on (seed, epoch, position) alone, never on what was asked for before, so it is the same with any
number of loader processes, in any order, and after a resume. Epochs count from 1, positions from 0.
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
from library.data.cache import NAN_CURE, DiskLatents, EncodeImages, LatentCaching, MemoryLatents
from library.data.captions import caption_variants, process_caption
from library.data.config_keys import DatasetConfig
from library.data.holdout import still
from library.data.masks import latent_mask
from library.data.order import EpochOrder, EpochPlanner
from library.data.pixels import Placed, augmented, cut, mask_bytes, placed, read_bytes, to_tensor
from library.data.table import build_table
from library.data.text_cache import DiskTexts, MemoryTexts
from library.data.tokens import CaptionTokenizer
from library.models.family import SD_LATENTS, Conditioning, LatentSpace, Tokens

log = logging.getLogger(__name__)

MOST_CAPTIONS = 10_000  # of which what the text encoder makes is kept in memory without an option that asks for it


@dataclass
class Batch:
    """Images of one bucket of one dataset. Either `images` or `latents` is set."""

    key: tuple[int, int]  # (epoch, position)
    size: tuple[int, int]  # width, height in pixels
    paths: list[str]
    captions: list[str]  # after shuffling, dropout, ...
    loss_weights: Tensor  # (B,) float32: 1, or prior_loss_weight for regularisation images
    sizes: Tensor  # (B, 6) int64: original height, width; cut off at top, left after resizing; height, width of the batch
    images: Tensor | None = None  # (B, 3, H, W) float32, -1..1
    latents: Tensor | None = None  # (B, C, h, w) float32, not scaled
    tokens: Tokens = field(default_factory=dict)  # see library.models.clip.tokenize; empty without tokenizers, and with `text`
    text: Conditioning | None = None  # what the text encoders make of the captions, if that is cached
    masks: Tensor | None = None  # (B, 1, H/8, W/8) float32, 0..1: how much of the error counts; only if an image has a mask

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the DataLoader calls this with pin_memory=True."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        kinds = (Tensor, Conditioning)
        pinned: dict[str, Any] = {name: value.pin_memory() for name, value in values.items() if isinstance(value, kinds)}
        return replace(self, tokens={name: value.pin_memory() for name, value in self.tokens.items()}, **pinned)


@dataclass(frozen=True)
class Use:
    """One use of an image: its caption then, its pixels (H, W, 3) uint8, its mask (H, W) uint8, and where they are cut from."""

    caption: str
    pixels: np.ndarray
    mask: np.ndarray | None
    place: Placed


class TrainingDataset(Dataset):
    """Indexes the images of all datasets and builds batches by key.

    `dataset[(epoch, position)]` gives a Batch. `max_train_steps` (of which a token_warmup_step below 1 is a share) may
    be set later, but before a loader is made. `world` processes take the batches of an epoch by turns.
    `on_bad_image`: see `index_folders`. Without tokenizers batches hold no tokens. `latent_space`: that of the model.
    """

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        *,
        seed: int,
        tokenizers: Sequence[Any] = (),
        latent_space: LatentSpace = SD_LATENTS,
        max_token_length: int | None = None,
        weighted_captions: bool = False,
        prior_loss_weight: float = 1.0,
        max_train_steps: int = 0,
        gradient_accumulation_steps: int = 1,
        world: int = 1,
        on_bad_image: str = "refuse",
    ) -> None:
        self.seed = seed
        self.max_train_steps = max_train_steps
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.world = world
        self.table = build_table(datasets, on_bad_image, seed)
        self.loss_weights = np.where(self.table.is_reg(), prior_loss_weight, 1.0).astype(np.float32)
        self.planner = EpochPlanner(self.table, seed)
        self.latents: MemoryLatents | DiskLatents | None = None
        self.texts: MemoryTexts | DiskTexts | None = None  # to be set before a loader is made
        self.latent_space = latent_space
        self.tokenizer: CaptionTokenizer | None = None
        if tokenizers:
            self.tokenizer = CaptionTokenizer(tokenizers, max_token_length, weighted_captions)
            self.tokenizer.warn_of_long(self.table.captions)
        self._last_order: tuple[int, EpochOrder] | None = None

    def validation(self) -> TrainingDataset | None:
        """The images held out, as a dataset that shows them and their captions unchanged; None if there are none.

        Its latents are cached apart.
        """
        if not self.table.held_out.any():
            return None
        other = copy.copy(self)
        subsets = [replace(subset, config=still(subset.config)) for subset in self.table.subsets]
        other.table = replace(self.table, subsets=subsets, repeats=self.table.validated().astype(np.int32))
        other.loss_weights = np.ones_like(self.loss_weights)
        other.planner = EpochPlanner(other.table, self.seed)
        other.latents, other._last_order = None, None
        return other

    @property
    def num_batches(self) -> int:
        """Batches of a whole epoch, over all datasets and processes."""
        return len(self.planner)

    def __len__(self) -> int:
        return self.num_batches

    def epoch_order(self, epoch: int) -> EpochOrder:
        """order[position]: rows of `table` that make the batch at that position."""
        if self._last_order is None or self._last_order[0] != epoch:
            self._last_order = (epoch, self.planner.order(epoch))
        return self._last_order[1]

    def paths(self, epoch: int, position: int) -> list[str]:
        """The images of the batch at this position."""
        return [str(self.table.path(row)) for row in self.epoch_order(epoch)[position].tolist()]

    def step_of(self, epoch: int, position: int) -> int:
        """Optimizer steps done before this batch, which the warm-up of tags counts by."""
        a_process = -(-self.num_batches // self.world)
        steps = -(-a_process // self.gradient_accumulation_steps)
        return (epoch - 1) * steps + position // self.world // self.gradient_accumulation_steps

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
        """The caption that the batch at this position has in one place."""
        row = int(self.epoch_order(epoch)[position][slot])
        return self._caption(row, self._random(epoch, position, slot), epoch, position)

    def use(self, epoch: int, position: int, slot: int) -> Use:
        """What the batch at this position holds in one place, in pixels even where latents are cached.

        Raises UserError if the image cannot be read.
        """
        row = int(self.epoch_order(epoch)[position][slot])
        rng = self._random(epoch, position, slot)
        caption = self._caption(row, rng, epoch, position)
        flipped = self._is_flipped(row, rng)
        pixels, mask, place = augmented(self.table, row, rng)
        if flipped:
            pixels, mask = pixels[:, ::-1], None if mask is None else mask[:, ::-1]
        return Use(caption, pixels, mask, place)

    def unchanged(self, row: int) -> Use:
        """An image and its caption as validation uses them. Raises UserError if the image cannot be read."""
        place, config = placed(self.table, row), still(self.table.config(row))
        caption = process_caption(self.table.captions[row], config, random.Random(0), epoch=1, step=0, max_train_steps=0)
        return Use(caption, *cut(place, read_bytes(place.path), mask_bytes(place)), place)

    def _random(self, epoch: int, position: int, slot: int) -> random.Random:
        return random.Random(f"{self.seed}/picture/{epoch}/{position}/{slot}")

    def _is_flipped(self, row: int, rng: random.Random) -> bool:
        """To be drawn before anything else about the image: so it is the same with and without a cache."""
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
        """Pixels (H, W, 3) uint8 or latents (C, h, w), mask (1, h, w), and the sizes as in `Batch`."""
        flipped = self._is_flipped(row, rng)
        image: Tensor | np.ndarray
        if self.latents is not None:
            image, mask = self.latents.get(row, flipped)
            place = placed(self.table, row)
        else:
            pixels, values, place = augmented(self.table, row, rng)
            image = pixels[:, ::-1] if flipped else pixels
            mask = None if values is None else latent_mask(values, self.latent_space)
        return image, (mask.flip(2) if flipped and mask is not None else mask), place.sizes(flipped)

    def cache_latents(
        self, encode: EncodeImages, *, batch_size: int, to_disk: bool, fingerprint: str, workers: int | None = None,
        share: tuple[int, int] = (0, 1), gather: Callable[[Any], list[Any]] = lambda value: [value], cure: str = NAN_CURE,
    ) -> None:  # fmt: skip
        """Encode every image once; batches then hold `latents` in place of `images`.

        `encode(images, seeds)`: (B, 3, H, W) float32 in -1..1 on the CPU and one seed an image -> (B, C, h, w).
        `fingerprint` names whatever else decides the result: weights and dtype of the VAE.
        `share`: (rank, world), if several processes share the work; `gather` then gives all of them the values of all.
        `cure`: what to do about a VAE whose values are not finite. To be called before a loader is made.
        """
        caching = LatentCaching(
            self.table, encode, batch_size=batch_size, to_disk=to_disk, fingerprint=fingerprint, workers=workers, share=share,
            latent_space=self.latent_space, cure=cure,
        )  # fmt: skip
        self.latents = caching.run()
        if share[1] > 1:
            self.latents.join(gather)

    def caption_variants(self, limit: int | None = MOST_CAPTIONS) -> dict[str, Path] | None:
        """Every caption that a batch can hold, sorted, with the folder of the first image that has it.

        None if captions change without end, or if there are more than `limit`.
        """
        found: dict[str, Path] = {}
        for row in np.flatnonzero(self.table.repeats).tolist():
            variants = caption_variants(self.table.captions[row], self.table.config(row))
            if variants is None:
                return None
            for caption in variants:
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
        """Counts, buckets and tags, one entry a dataset."""
        return facts.describe(self.table)

    def bucket_table(self) -> str:
        """The buckets with their counts, as text for the screen."""
        return facts.bucket_text(self.describe())
