"""The text cache: outputs of frozen text encoders, computed once, in memory or on disk in folders `.texts` beside the images.

The name of a file on disk is a key made of the caption and of all else that decides the result. So a changed caption, model or
setting never gets an old file. Each caption is encoded alone, so that its values do not depend on the other captions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor
from tqdm import tqdm

from library.data.cache_files import require_writable, save, shapes_in
from library.data.table import ImageTable
from library.errors import UserError
from library.models.family import Conditioning
from library.option_traits import fields_with
from library.parallel import ahead
from library.safe_text import bytes_of

FOLDER = ".texts"
VERSION = 1  # raise it when reading or encoding text changes its result
WRITERS = 4

# One caption -> a Conditioning of one row, on the CPU.
EncodeText = Callable[[str], Conditioning]


class MemoryTexts:
    """Encoded captions in memory; loader processes share them."""

    def __init__(self, rows: dict[str, int], states: Conditioning) -> None:
        self.rows, self.states = rows, states

    def lookup(self, captions: list[str]) -> Conditioning:
        """A row for each caption, in the dtype in which it was encoded."""
        return self.states.rows([self.rows[caption] for caption in captions])


class DiskTexts:
    """Encoded captions on disk, in one small file for each, read at each use."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self.paths = paths

    def lookup(self, captions: list[str]) -> Conditioning:
        """A row for each caption. Raises UserError if a file was removed or damaged since the run began."""
        return Conditioning.cat([Conditioning(_read(self.paths[caption])) for caption in captions])


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except Exception as error:  # safetensors has errors of its own
        raise UserError(f"cached text {path} cannot be read ({error}); start again, it is made anew") from error


def keep_in_memory(captions: Iterable[str], encode: EncodeText) -> MemoryTexts:
    """Encode each distinct caption."""
    distinct = list(dict.fromkeys(captions))
    states: dict[str, Tensor] = {}
    for number, row in enumerate(_encoded(distinct, encode)):
        for name, value in row.tensors.items():
            if name not in states:  # filled in place: a second copy could be gigabytes
                states[name] = torch.empty((len(distinct), *value.shape[1:]), dtype=value.dtype)
            states[name][number] = value[0]
    return MemoryTexts({caption: number for number, caption in enumerate(distinct)}, Conditioning(states))


def keep_on_disk(
    folders: Mapping[str, Path], encode: EncodeText, *, fingerprint: str, shapes: Mapping[str, tuple[int, ...]],
    share: tuple[int, int] = (0, 1), wait: Callable[[], None] = lambda: None,
) -> DiskTexts:  # fmt: skip
    """Encode each caption that has no file yet in its folder of images.

    fingerprint: stands for all that decides the result besides the caption. shapes: of a row's tensors, without the dimension
    of rows. share: (rank, world), if several processes share the work; `wait` then waits for all of them.
    """
    paths = {caption: folder / FOLDER / f"{text_key(caption, fingerprint)}.safetensors" for caption, folder in folders.items()}
    wanted = {name: [1, *shape] for name, shape in shapes.items()}
    rank, world = share
    missing = [caption for caption in list(paths)[rank::world] if shapes_in(paths[caption]) != wanted]
    for folder in {paths[caption].parent for caption in missing}:
        require_writable(folder, "cache_text_encoder_outputs_to_disk", "cache_text_encoder_outputs")
    with ThreadPoolExecutor(WRITERS) as pool:
        rows = zip(missing, _encoded(missing, encode), strict=True)
        for _ in ahead(pool, lambda pair: save(paths[pair[0]], dict(pair[1].tensors)), rows, 2 * WRITERS):
            pass
    wait()
    return DiskTexts(paths)


def text_key(caption: str, fingerprint: str) -> str:
    """24 hex digits over everything that decides a caption's row."""
    parts = [VERSION, hashlib.sha256(bytes_of(caption)).hexdigest(), fingerprint]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _encoded(captions: list[str], encode: EncodeText) -> Iterator[Conditioning]:
    """The row of each caption. Raises UserError for one that is not finite."""
    for caption in tqdm(captions, desc="caching captions", unit=" captions", delay=1.0):
        row = encode(caption)
        if not all(bool(torch.isfinite(value).all()) for value in row.tensors.values()):
            raise UserError(
                f"the text encoder gives values that are not finite for the caption {caption[:60]!r}; "
                "use --mixed_precision bf16 or no"
            )
        yield row


def varying_captions(table: ImageTable) -> Iterator[str]:
    """An error for each option of a subset that changes captions at each use: a cached caption is always the same."""
    for subset in table.subsets:
        for key in fields_with(type(subset.config), varies=("caption",)):
            if getattr(subset.config, key):
                yield (
                    f"{key} of the subset {subset.config.image_dir} changes captions at each use, so the text encoder's outputs "
                    f"cannot be cached; take out {key}, or --cache_text_encoder_outputs"
                )
