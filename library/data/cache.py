"""The latent cache: latents of all images, computed once, in memory or on disk in a folder `.latents` beside the images.

The name of a file on disk has a key made of the image's content, its crop and the VAE. So a changed image, resolution or VAE
never gets an old file, and interrupted caching continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor
from tqdm import tqdm

from library.data.cache_files import require_writable, save, shapes_in
from library.data.images import has_other_colours, has_transparency
from library.data.masks import latent_mask
from library.data.pixels import ImageCrop, centre_crop, decode_crop, read_bytes, read_mask, to_tensor
from library.data.table import ImageTable
from library.errors import UserError
from library.models.family import LatentSpace
from library.option_traits import fields_with
from library.parallel import ahead

FOLDER = ".latents"
VERSION = 1  # raise it when decoding, resizing or flipping change their result
NAN_CURE = "run it in full precision with --no_half_vae, or use another --vae"

# (images (B, 3, H, W) float32 in -1..1 on the CPU, one seed for each image) -> (B, C, h, w).
# A seed comes from the image's content, so that latents do not depend on which images are encoded together.
EncodeImages = Callable[[Tensor, "list[int]"], Tensor]


@dataclass(frozen=True)
class LatentEncoder:
    """A VAE for the cache. fingerprint: stands for its weights and dtype. cure: for the error about non-finite values."""

    encode: EncodeImages
    fingerprint: str
    space: LatentSpace
    cure: str = NAN_CURE


def latent_key(content: bytes, crop: ImageCrop, fingerprint: str, mask: bytes | None = None) -> str:
    """24 hex digits over everything that decides an image's latents and mask."""
    parts = {
        "version": VERSION,
        "content": hashlib.sha256(content).hexdigest(),
        "cut": [crop.resized, crop.corner, crop.size, crop.interpolation],
        "vae": fingerprint,
    }
    if mask is not None or crop.alpha_mask:
        parts["mask"] = "alpha" if mask is None else hashlib.sha256(mask).hexdigest()
    # Extra keys instead of a new VERSION: that would change the latents of all other images, whose noise comes from this key.
    if has_other_colours(content):
        parts["colours"] = "sRGB"
    if mask is not None and has_transparency(mask):
        parts["erased"] = "black"
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def seed_of(key: str, flipped: bool) -> int:
    """The seed for sampling the VAE's posterior of an image (below 2**60)."""
    return int(hashlib.sha256(f"{key}/{'flipped' if flipped else 'upright'}".encode()).hexdigest()[:15], 16)


def cache_path(image: Path, key: str) -> Path:
    """The cache file of an image. Its name holds at most 40 letters of the image's, since file systems allow 255 bytes."""
    return image.parent / FOLDER / f"{image.stem[:40]}-{key}.safetensors"


def is_whole(path: Path, names: list[str], size: tuple[int, int]) -> bool:
    """Whether a cache file exists and holds these tensors, of `size` (rows, columns)."""
    shapes = shapes_in(path)
    return all(shapes.get(name, [])[1:] == list(size) for name in names)


@dataclass(frozen=True)
class Prepared:
    """An image ready for the VAE. `pixels` is None if its latents are on disk already."""

    row: int
    crop: ImageCrop
    key: str
    pixels: np.ndarray | None
    mask: Tensor | None = None  # (1, h, w) float32, at the size of latents


class MemoryLatents:
    """Latents in memory, stacked by bucket; loader processes share them."""

    def __init__(self, table: ImageTable) -> None:
        self.bucket = table.bucket
        self.position = np.full((len(table), 2), -1, dtype=np.int32)  # within the bucket: upright, flipped
        self.stacks: dict[int, Tensor] = {}
        self._parts: dict[int, list[Tensor]] = {}
        self._mask_parts: dict[int, list[Tensor]] = {}
        self.masks: dict[int, Tensor] = {}  # (n, 1, h, w) by bucket, in the order of the stacks; empty without masks
        self.keeps_masks = table.has_masks()

    def add(self, prepared: list[Prepared], latents: Tensor, flipped: bool) -> None:
        bucket = int(self.bucket[prepared[0].row])
        parts = self._parts.setdefault(bucket, [])
        start = sum(len(part) for part in parts)
        self.position[[item.row for item in prepared], int(flipped)] = np.arange(start, start + len(prepared))
        parts.append(latents)
        if self.keeps_masks:  # one for each latent of the stack, flipped ones too
            blank = torch.ones(1, *latents.shape[2:])
            self._mask_parts.setdefault(bucket, []).extend(blank if item.mask is None else item.mask for item in prepared)

    def finish(self) -> None:
        self.stacks = {bucket: torch.cat(self._parts.pop(bucket)) for bucket in list(self._parts)}
        self.masks = {bucket: torch.stack(self._mask_parts.pop(bucket)) for bucket in list(self._mask_parts)}

    def join(self, gather: Callable[[Any], list[Any]]) -> None:
        """Combine what several processes encoded; `gather` gives every process the values of all.

        One bucket at a time, since the parts and the whole of a bucket are in memory together.
        """
        offsets = {}
        for bucket in sorted(set().union(*gather(set(self.stacks)))):
            parts = gather((self.stacks.get(bucket), self.masks.get(bucket)))
            offsets[bucket] = np.cumsum([0, *(0 if stack is None else len(stack) for stack, _ in parts)])
            self.stacks[bucket] = torch.cat([stack for stack, _ in parts if stack is not None])
            masks = [mask for _, mask in parts if mask is not None]
            if masks:
                self.masks[bucket] = torch.cat(masks)
        for rank, position in enumerate(gather(self.position.copy())):
            rows, side = np.nonzero(position >= 0)
            shift = np.array([offsets[bucket][rank] for bucket in self.bucket[rows].tolist()], dtype=np.int32)
            self.position[rows, side] = position[rows, side] + shift

    def get(self, row: int, flipped: bool) -> tuple[Tensor, Tensor | None]:
        """Latents (C, h, w) and mask (1, h, w), both float32; the mask is not flipped."""
        bucket, position = int(self.bucket[row]), int(self.position[row, int(flipped)])
        return self.stacks[bucket][position], self.masks[bucket][position] if self.masks else None


class DiskLatents:
    """Latents on disk, in one small file for each image, read at each use."""

    def __init__(self, table: ImageTable, keys: dict[int, str]) -> None:
        self.table, self.keys = table, keys

    def join(self, gather: Callable[[Any], list[Any]]) -> None:
        """Add the keys of the files that other processes wrote; see `MemoryLatents.join`."""
        for keys in gather(self.keys):
            self.keys |= keys

    def get(self, row: int, flipped: bool) -> tuple[Tensor, Tensor | None]:
        """As `MemoryLatents.get`. Raises UserError if the file was removed or damaged since the run began."""
        path = cache_path(self.table.path(row), self.keys[row])
        try:
            tensors = load(path.read_bytes())  # `load_file` maps the file: twice the time for small ones
            return tensors[tensor_name(flipped)], tensors.get("mask")
        except Exception as error:  # safetensors has errors of its own
            raise UserError(f"cached latents {path} cannot be read ({error}); start again, they are made anew") from error


def tensor_name(flipped: bool) -> str:
    return "latents_flipped" if flipped else "latents"


class LatentCaching:
    """One pass over the images: reader threads decode and crop, the calling thread encodes, writer threads save.

    share: (rank, world). Each of several processes takes every world-th image; `join` combines their results.
    """

    def __init__(
        self,
        table: ImageTable,
        vae: LatentEncoder,
        *,
        batch_size: int,
        to_disk: bool,
        workers: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        reject_augmentations(table)
        self.table, self.vae, self.batch_size, self.to_disk, self.share = table, vae, batch_size, to_disk, share
        self.workers = workers or min(16, 2 * (os.cpu_count() or 1))
        self.memory = MemoryLatents(table)
        self.keys: dict[int, str] = {}
        self.writable: set[Path] = set()
        self.writes: deque[Future] = deque()

    def run(self) -> MemoryLatents | DiskLatents:
        rows = np.flatnonzero(self.table.repeats)
        rank, world = self.share
        rows = rows[np.argsort(self.table.bucket[rows], kind="stable")][rank::world].tolist()
        with (
            ThreadPoolExecutor(2) as writers,
            ThreadPoolExecutor(self.workers) as readers,
            tqdm(total=len(rows), desc="caching latents", unit=" images") as bar,
        ):
            try:
                ready = ahead(readers, self.prepare, rows, self.workers + 2 * self.batch_size)
                for batch in self.batches(ready, bar):
                    self.encode_batch(batch, writers)
                while self.writes:
                    self.writes.popleft().result()
            except BaseException:  # encoded images are still written, so the next run continues from there
                readers.shutdown(cancel_futures=True)
                raise
        if self.to_disk:
            return DiskLatents(self.table, self.keys)
        self.memory.finish()
        return self.memory

    def prepare(self, row: int) -> Prepared:
        crop = centre_crop(self.table, row)
        content = read_bytes(crop.path)
        mask = read_mask(crop)
        key = latent_key(content, crop, self.vae.fingerprint, mask)
        if self.to_disk and is_whole(cache_path(crop.path, key), self.names(row), self.vae.space.size(*crop.size)):
            return Prepared(row, crop, key, None)
        pixels, values = decode_crop(crop, content, mask)
        return Prepared(row, crop, key, pixels, None if values is None else latent_mask(values, self.vae.space))

    def names(self, row: int) -> list[str]:
        """Tensors that the cache file of an image must hold. A mask from the alpha channel is optional, as the channel is."""
        names = ["latents", "latents_flipped"] if self.table.config(row).flip_aug else ["latents"]
        return names + ["mask"] * (self.table.mask(row) is not None)

    def batches(self, ready: Iterable[Prepared], bar: tqdm) -> Iterator[list[Prepared]]:
        """Batches of images to encode, at most batch_size of one bucket each. Images that are cached already are left out."""
        batch: list[Prepared] = []
        for item in ready:
            bar.update()
            self.keys[item.row] = item.key
            if item.pixels is None:
                continue
            if batch and (len(batch) == self.batch_size or self.table.bucket[batch[0].row] != self.table.bucket[item.row]):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def encode_batch(self, batch: list[Prepared], writers: ThreadPoolExecutor) -> None:
        images = to_tensor([item.pixels for item in batch if item.pixels is not None])
        latents = self.encoded(images, batch, flipped=False)
        to_flip = [i for i, item in enumerate(batch) if self.table.config(item.row).flip_aug]
        flipped = self.encoded(images[to_flip].flip(3), [batch[i] for i in to_flip], flipped=True) if to_flip else None
        if not self.to_disk:
            self.memory.add(batch, latents, flipped=False)
            if flipped is not None:
                self.memory.add([batch[i] for i in to_flip], flipped, flipped=True)
            return
        for i, item in enumerate(batch):
            tensors = {"latents": latents[i].clone()}
            if item.mask is not None:
                tensors["mask"] = item.mask
            if flipped is not None and i in to_flip:
                tensors["latents_flipped"] = flipped[to_flip.index(i)].clone()
            self.write(item, tensors, writers)

    def encoded(self, images: Tensor, batch: list[Prepared], flipped: bool) -> Tensor:
        latents = self.vae.encode(images, [seed_of(item.key, flipped) for item in batch]).detach().to("cpu", torch.float32)
        good = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
        if not all(good):
            raise UserError(f"the VAE gives values that are not finite for {batch[good.index(False)].crop.path}; {self.vae.cure}")
        return latents

    def write(self, item: Prepared, tensors: dict[str, Tensor], writers: ThreadPoolExecutor) -> None:
        """Save in a writer thread. Raises the errors of earlier saves."""
        path = cache_path(item.crop.path, item.key)
        if path.parent not in self.writable:
            require_writable(path.parent, "cache_latents_to_disk", "cache_latents")
            self.writable.add(path.parent)
        self.writes.append(writers.submit(save, path, tensors))
        while len(self.writes) > 2 * self.batch_size:
            self.writes.popleft().result()


def reject_augmentations(table: ImageTable) -> None:
    """Raises UserError if a subset has an option that changes pixels at each use: a cached image is always the same."""
    for subset in table.subsets:
        for option in fields_with(type(subset.config), varies=("pixels",)):
            if getattr(subset.config, option):
                raise UserError(
                    f"{option} of the subset {subset.config.image_dir} changes images at each use, "
                    f"so latents cannot be cached; take out {option}, or --cache_latents"
                )
