"""A model in one file, in CompVis' layout: taken apart into its parts and put together again, without losing a tensor.

What differs between families is a `Layout`: how each part is named, and below which prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from library.formats.names import (
    CLIP_PREFIX,
    FIRST_EMBEDDER,
    OLD_CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    SECOND_EMBEDDER,
    UNET_PREFIX,
    VAE_PREFIX,
    clip_to_open_clip,
    open_clip_layers,
    open_clip_to_diffusers,
    pooling_clip_to_open_clip,
    pooling_open_clip_to_diffusers,
    renamed,
    unet_layout,
    unet_table,
    unet_to_compvis,
    vae_table_for,
    vae_to_compvis_all,
    vae_to_diffusers,
)

Parts = dict[str, dict[str, Tensor]]  # part -> Diffusers name (text encoders: without `text_model.`) -> tensor
# A weight under its name in the file -> the same under its names in the part.
Rename = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class PartLayout:
    """One part: the naming of its weights, and the prefixes that occur; the first one is written."""

    part: str
    naming: Literal["unet", "vae", "clip", "open_clip", "pooling_open_clip"]
    prefixes: tuple[str, ...]


Layout = tuple[PartLayout, ...]

_UNET_AND_VAE = (PartLayout("unet", "unet", (UNET_PREFIX,)), PartLayout("vae", "vae", (VAE_PREFIX,)))
SD1_LAYOUT: Layout = (*_UNET_AND_VAE, PartLayout("text_encoder", "clip", (CLIP_PREFIX, OLD_CLIP_PREFIX)))
SD2_LAYOUT: Layout = (*_UNET_AND_VAE, PartLayout("text_encoder", "open_clip", (OPEN_CLIP_PREFIX,)))
SDXL_LAYOUT: Layout = (
    *_UNET_AND_VAE,
    PartLayout("text_encoder", "clip", (f"{FIRST_EMBEDDER}transformer.text_model.",)),
    PartLayout("text_encoder_2", "pooling_open_clip", (f"{SECOND_EMBEDDER}model.",)),
)


# Of the 24 text layers of SD 2. Some programs write these alone: Diffusers' script, EveryDream2, OneTrainer.
SD2_TEXT_LAYERS = 23

LAYOUTS = (SD1_LAYOUT, SD2_LAYOUT, SDXL_LAYOUT)


def layout_of(names: Iterable[str], layouts: Sequence[Layout] = LAYOUTS) -> Layout | None:
    """The layout whose text encoders a file with these tensors holds: widths say nothing of small models. None: it holds none."""
    names = list(names)

    def holds(row: PartLayout) -> bool:
        return any(name.startswith(row.prefixes) for name in names)

    texts = {layout: [row for row in layout if row.naming not in ("unet", "vae")] for layout in layouts}
    return next((layout for layout in layouts if all(map(holds, texts[layout]))), None)


class SingleFileNames:
    """Where each tensor of a single file belongs, worked out from the names of all of them."""

    def __init__(self, names: Iterable[str], layout: Layout):
        names = list(names)
        self.prefixes: dict[str, str] = {}  # of the parts that are in the file
        self.unknown: list[str] = []  # weights of the U-Net that are of other families
        self._renames: dict[str, Rename] = {}
        for row in layout:
            prefix = next((prefix for prefix in row.prefixes if any(name.startswith(prefix) for name in names)), None)
            if prefix is None:
                continue
            self.prefixes[row.part] = prefix
            self._renames[row.part] = _RENAMES[row.naming](_inside(names, prefix))
            if row.naming == "unet":
                rename, nothing = self._renames[row.part], torch.empty(0)
                self.unknown += [prefix + name for name in _inside(names, prefix) if not rename(name, nothing)]

    def to_parts(self, name: str, value: Tensor) -> list[tuple[str, str, Tensor]]:
        """(part, Diffusers name, tensor) of a tensor: three for OpenCLIP's joined attention, none for what is not used.

        Not used are: the noise schedule, averaged (EMA) weights, position_ids, logit_scale, and of SD 2's OpenCLIP the last layer
        (it was trained on the one before) and text_projection.
        """
        for part, prefix in self.prefixes.items():
            if name.startswith(prefix):
                return [(part, new, tensor) for new, tensor in self._renames[part](name[len(prefix) :], value)]
        return []


def split_compvis(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[Parts, dict[str, Tensor]]:
    """The parts of a single file's state dictionary, and the tensors that belong to none under the names they had."""
    names = SingleFileNames(tensors, layout)
    parts: Parts = {row.part: {} for row in layout}
    extra = {}
    for name, value in tensors.items():
        in_parts = names.to_parts(name, value)
        for part, new, tensor in in_parts:
            parts[part][new] = tensor
        if not in_parts:
            extra[name] = value
    return parts, extra


def join_compvis(
    parts: Parts, layout: Layout, *, extra: Mapping[str, Tensor] | None = None, prefixes: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """The reverse of `split_compvis`: the state dictionary of a single file, with `extra` as it is.

    `prefixes` of parts win over those of the layout. Without an `extra` that holds it, OpenCLIP's unused last layer becomes a
    copy of the one before, and text_projection and logit_scale neutral values, since programs that read SD 2 files expect them.
    """
    result: dict[str, Tensor] = {}
    for row in layout:
        prefix = (prefixes or {}).get(row.part, row.prefixes[0])
        named = {prefix + name: value for name, value in _TO_FILE[row.naming](parts[row.part]).items()}
        if row.naming == "open_clip" and (not extra or open_clip_layers(extra) == 0):
            named |= _unused_open_clip(named, prefix)
        if row.naming == "pooling_open_clip":  # of images, against which CLIP was trained; replaced by that in `extra`
            named[prefix + "logit_scale"] = torch.tensor(math.log(100.0)).to(next(iter(named.values())).dtype)
        result |= named
    return result | dict(extra or {})


def _rename_unet(names: list[str]) -> Rename:
    table = unet_table(unet_layout(names))
    return lambda name, value: [] if (new := renamed(name, table)) is None else [(new, value)]


def _rename_vae(names: list[str]) -> Rename:
    table = vae_table_for(names)
    return lambda name, value: [] if (new := renamed(name, table)) is None else [(new, vae_to_diffusers(new, value))]


def _rename_clip(names: list[str]) -> Rename:
    def rename(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        used = name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) and not name.endswith("position_ids")
        return [(name, value)] if used else []

    return rename


def _rename_open_clip(names: list[str]) -> Rename:
    layers = open_clip_layers(names)
    unused_layer = f"transformer.resblocks.{layers if layers == SD2_TEXT_LAYERS else layers - 1}."
    return lambda name, value: [] if name.startswith(unused_layer) else open_clip_to_diffusers(name, value).items()


_RENAMES: dict[str, Callable[[list[str]], Rename]] = {
    "unet": _rename_unet,
    "vae": _rename_vae,
    "clip": _rename_clip,
    "open_clip": _rename_open_clip,
    "pooling_open_clip": lambda names: lambda name, value: pooling_open_clip_to_diffusers(name, value).items(),
}
_TO_FILE: dict[str, Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]] = {
    "unet": unet_to_compvis,
    "vae": vae_to_compvis_all,
    "clip": lambda weights: weights,
    "open_clip": clip_to_open_clip,
    "pooling_open_clip": pooling_clip_to_open_clip,
}


def _unused_open_clip(text: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Stand-ins for what an OpenCLIP file has beyond what SD 2 uses."""
    layers = open_clip_layers(text)
    last, new = f".resblocks.{layers - 1}.", f".resblocks.{layers}."
    like = text[prefix + "ln_final.weight"]
    copies = {re.sub(re.escape(last), new, name): value.clone() for name, value in text.items() if last in name}
    width = like.shape[0]
    return copies | {
        prefix + "text_projection": torch.ones(width, width, dtype=like.dtype, device=like.device),
        prefix + "logit_scale": torch.ones((), dtype=like.dtype, device=like.device),
    }


def _inside(names: Iterable[str], prefix: str) -> list[str]:
    return [name[len(prefix) :] for name in names if name.startswith(prefix)]
