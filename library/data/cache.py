"""Latents of all images, computed once: kept in memory, or on disk in a folder `.latents` beside the images.

A file on disk is found under a key made of the image's content, the cut that is made of it, and the VAE. So an image,
resolution or VAE that changed never meets an old file, and caching that was broken off goes on where it was.
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
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from library.data.cache_files import require_writable, save, shapes_in
from library.data.images import has_other_colours, has_transparency
from library.data.masks import latent_mask
from library.data.pixels import Placed, cut, mask_bytes, placed, read_bytes, to_tensor
from library.data.table import ImageTable
from library.errors import UserError
from library.models.family import LatentSpace
from library.option_traits import fields_with
from library.parallel import ahead

FOLDER = ".latents"
VERSION = 1  # to be raised when decoding, resizing or flipping change their result
NAN_CURE = "run it in full precision with --no_half_vae, or use another --vae"

# (images (B, 3, H, W) float32 in -1..1 on the CPU, one seed an image) -> (B, 4, H/8, W/8).
# The seeds come from the images' content, so that latents do not depend on which images are encoded together.
EncodeImages = Callable[[Tensor, "list[int]"], Tensor]


def latent_key(content: bytes, place: Placed, fingerprint: str, mask: bytes | None = None) -> str:
    """24 hex digits over all that decides an image's latents and mask."""
    parts = {
        "version": VERSION,
        "content": hashlib.sha256(content).hexdigest(),
        "cut": [place.resized, place.corner, place.size, place.interpolation],
        "vae": fingerprint,
    }
    if mask is not None or place.alpha_mask:
        parts["mask"] = "alpha" if mask is None else hashlib.sha256(mask).hexdigest()
    # Not the version, which would change the latents of all other images too: their noise comes from this key.
    if has_other_colours(content):
        parts["colours"] = "sRGB"
    if mask is not None and has_transparency(mask):
        parts["erased"] = "black"
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def seed_of(key: str, flipped: bool) -> int:
    """The seed for the posterior sample of an image (below 2**60)."""
    return int(hashlib.sha256(f"{key}/{'flipped' if flipped else 'upright'}".encode()).hexdigest()[:15], 16)


def cache_path(image: Path, key: str) -> Path:
    """The name is cut, since file systems allow 255 bytes; the key alone tells files apart."""
    return image.parent / FOLDER / f"{image.stem[:40]}-{key}.safetensors"


def is_whole(path: Path, names: list[str], size: tuple[int, int]) -> bool:
    """Whether a cache file is there with all its tensors, of `size` (rows, columns)."""
    shapes = shapes_in(path)
    return all(shapes.get(name, [])[1:] == list(size) for name in names)


@dataclass(frozen=True)
class Prepared:
    """An image on its way to the VAE. `pixels` is None if its latents lie on disk already."""

    row: int
    place: Placed
    key: str
    pixels: np.ndarray | None
    mask: Tensor | None = None  # (1, h, w) float32, at the size of latents


class MemoryLatents:
    """Latents stacked by bucket, which loader processes share."""

    def __init__(self, table: ImageTable) -> None:
        self.bucket = table.bucket
        self.position = np.full((len(table), 2), -1, dtype=np.int32)  # within the bucket: upright, flipped
        self.stacks: dict[int, Tensor] = {}
        self._parts: dict[int, list[Tensor]] = {}
        self._mask_parts: dict[int, list[Tensor]] = {}
        self.masks: dict[int, Tensor] = {}  # (n, 1, h, w) by bucket, in the order of the upright latents; only if there are masks
        self.keeps_masks = table.has_masks()

    def add(self, prepared: list[Prepared], latents: Tensor, flipped: bool) -> None:
        bucket = int(self.bucket[prepared[0].row])
        parts = self._parts.setdefault(bucket, [])
        start = sum(len(part) for part in parts)
        self.position[[item.row for item in prepared], int(flipped)] = np.arange(start, start + len(prepared))
        parts.append(latents)
        if self.keeps_masks:  # one for each place of the stack, of mirrored latents too
            blank = torch.ones(1, *latents.shape[2:])
            self._mask_parts.setdefault(bucket, []).extend(blank if item.mask is None else item.mask for item in prepared)

    def finish(self) -> None:
        self.stacks = {bucket: torch.cat(self._parts.pop(bucket)) for bucket in list(self._parts)}
        self.masks = {bucket: torch.stack(self._mask_parts.pop(bucket)) for bucket in list(self._mask_parts)}

    def join(self, gather: Callable[[Any], list[Any]]) -> None:
        """Put together what several processes encoded; `gather` gives all of them the values of all.

        One bucket after the other, since a part and the whole of it are in memory at once.
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
        """Latents (4, h, w) and mask (1, h, w), both float32; the mask is upright."""
        bucket, position = int(self.bucket[row]), int(self.position[row, int(flipped)])
        return self.stacks[bucket][position], self.masks[bucket][position] if self.masks else None


class DiskLatents:
    """Latents in one small file an image, read at each use."""

    def __init__(self, table: ImageTable, keys: dict[int, str]) -> None:
        self.table, self.keys = table, keys

    def join(self, gather: Callable[[Any], list[Any]]) -> None:
        """Learn the keys of the files that other processes made."""
        for keys in gather(self.keys):
            self.keys |= keys

    def get(self, row: int, flipped: bool) -> tuple[Tensor, Tensor | None]:
        """Latents (4, h, w) and upright mask (1, h, w). Raises UserError if the file is gone or damaged since the run began."""
        path = cache_path(self.table.path(row), self.keys[row])
        try:
            tensors = load_file(path)
            return tensors[tensor_name(flipped)], tensors.get("mask")
        except Exception as error:  # safetensors has errors of its own
            raise UserError(f"cached latents {path} cannot be read ({error}); start again, they are made anew") from error


def tensor_name(flipped: bool) -> str:
    return "latents_flipped" if flipped else "latents"


class LatentCaching:
    """One pass over the images: threads read and cut, the caller's thread encodes, threads write.

    share: (rank, world). Of several processes each takes every world-th image; `join` puts the parts together. cure: for the
    error about values that are not finite.
    """

    def __init__(
        self, table: ImageTable, encode: EncodeImages, *, batch_size: int, to_disk: bool, fingerprint: str, workers: int | None,
        latent_space: LatentSpace, share: tuple[int, int] = (0, 1), cure: str = NAN_CURE,
    ) -> None:  # fmt: skip
        refuse_augmentations(table)
        self.cure = cure
        self.table, self.encode, self.batch_size = table, encode, batch_size
        self.to_disk, self.fingerprint, self.share, self.latent_space = to_disk, fingerprint, share, latent_space
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
            except BaseException:  # what is encoded is still written: the next run goes on from there
                readers.shutdown(cancel_futures=True)
                raise
        if self.to_disk:
            return DiskLatents(self.table, self.keys)
        self.memory.finish()
        return self.memory

    def prepare(self, row: int) -> Prepared:
        place = placed(self.table, row)
        content = read_bytes(place.path)
        mask = mask_bytes(place)
        key = latent_key(content, place, self.fingerprint, mask)
        if self.to_disk and is_whole(cache_path(place.path, key), self.names(row), self.latent_space.size(*place.size)):
            return Prepared(row, place, key, None)
        pixels, values = cut(place, content, mask)
        return Prepared(row, place, key, pixels, None if values is None else latent_mask(values, self.latent_space))

    def names(self, row: int) -> list[str]:
        """Tensors that the file of an image must hold; a mask from the alpha channel may be missing, as the channel may."""
        names = ["latents", "latents_flipped"] if self.table.config(row).flip_aug else ["latents"]
        return names + ["mask"] * (self.table.mask(row) is not None)

    def batches(self, ready: Iterable[Prepared], bar: tqdm) -> Iterator[list[Prepared]]:
        """Images that need encoding, at most batch_size of one bucket at a time."""
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
        upright = self.encoded(images, batch, flipped=False)
        turn = [i for i, item in enumerate(batch) if self.table.config(item.row).flip_aug]
        mirrored = self.encoded(images[turn].flip(3), [batch[i] for i in turn], flipped=True) if turn else None
        if not self.to_disk:
            self.memory.add(batch, upright, flipped=False)
            if mirrored is not None:
                self.memory.add([batch[i] for i in turn], mirrored, flipped=True)
            return
        for i, item in enumerate(batch):
            tensors = {"latents": upright[i].clone()}
            if item.mask is not None:
                tensors["mask"] = item.mask
            if mirrored is not None and i in turn:
                tensors["latents_flipped"] = mirrored[turn.index(i)].clone()
            self.write(item, tensors, writers)

    def encoded(self, images: Tensor, batch: list[Prepared], flipped: bool) -> Tensor:
        latents = self.encode(images, [seed_of(item.key, flipped) for item in batch]).detach().to("cpu", torch.float32)
        good = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
        if not all(good):
            raise UserError(f"the VAE gives values that are not finite for {batch[good.index(False)].place.path}; {self.cure}")
        return latents

    def write(self, item: Prepared, tensors: dict[str, Tensor], writers: ThreadPoolExecutor) -> None:
        """Save in a thread; earlier saves that failed are raised here."""
        path = cache_path(item.place.path, item.key)
        if path.parent not in self.writable:
            require_writable(path.parent, "cache_latents_to_disk", "cache_latents")
            self.writable.add(path.parent)
        self.writes.append(writers.submit(save, path, tensors))
        while len(self.writes) > 2 * self.batch_size:
            self.writes.popleft().result()


def refuse_augmentations(table: ImageTable) -> None:
    """A cached image is the same at every use."""
    for subset in table.subsets:
        for option in fields_with(type(subset.config), varies=("pixels",)):
            if getattr(subset.config, option):
                raise UserError(
                    f"{option} of the subset {subset.config.image_dir} changes images at each use, "
                    f"so latents cannot be cached; take out {option}, or --cache_latents"
                )
