"""A CompVis checkpoint taken apart into its three models and put together again, without losing a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from library.formats.names import (
    CLIP_PREFIX,
    OLD_CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    clip_to_open_clip,
    open_clip_layers,
    open_clip_to_diffusers,
    renamed,
    unet_layout,
    unet_table,
    unet_to_compvis,
    vae_table_for,
    vae_to_compvis_all,
    vae_to_diffusers,
)

PARTS = ("unet", "vae", "text_encoder")
Parts = dict[str, dict[str, Tensor]]  # "unet", "vae", "text_encoder" -> Diffusers name (text: without `text_model.`) -> tensor


class CompVisNames:
    """Where each tensor of a CompVis checkpoint belongs, worked out from the names of all of them."""

    def __init__(self, names: Iterable[str]):
        names = list(names)
        prefixes = (OPEN_CLIP_PREFIX, CLIP_PREFIX, OLD_CLIP_PREFIX)
        self.text_prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)
        self.v2 = self.text_prefix == OPEN_CLIP_PREFIX
        in_unet = _inside(names, UNET_PREFIX)
        self._unet = unet_table(unet_layout(in_unet))
        self.unknown = [UNET_PREFIX + name for name in in_unet if renamed(name, self._unet) is None]  # of other families
        self._vae = vae_table_for(_inside(names, VAE_PREFIX))
        self._unused_layer = f"transformer.resblocks.{open_clip_layers(names) - 1}." if self.v2 else ""

    def place(self, name: str, value: Tensor) -> list[tuple[str, str, Tensor]]:
        """(part, Diffusers name, tensor) of a CompVis tensor: three for OpenCLIP's joined attention, none for what is not used.

        Not used are: the noise schedule, averaged (EMA) weights, position_ids, and of OpenCLIP the last layer (SD 2 was trained
        on the one before), text_projection and logit_scale.
        """
        if name.startswith(UNET_PREFIX):
            new = renamed(name[len(UNET_PREFIX) :], self._unet)
            return [] if new is None else [("unet", new, value)]
        if name.startswith(VAE_PREFIX):
            new = renamed(name[len(VAE_PREFIX) :], self._vae)
            return [] if new is None else [("vae", new, vae_to_diffusers(new, value))]
        if self.text_prefix and name.startswith(self.text_prefix):
            return [("text_encoder", new, part) for new, part in self._place_text(name[len(self.text_prefix) :], value)]
        return []

    def _place_text(self, name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        if self.v2:
            return [] if name.startswith(self._unused_layer) else list(open_clip_to_diffusers(name, value).items())
        used = name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) and not name.endswith("position_ids")
        return [(name, value)] if used else []


def split_compvis(tensors: Mapping[str, Tensor]) -> tuple[Parts, dict[str, Tensor]]:
    """The three models of a CompVis state dictionary, and the tensors that belong to none under the names they had."""
    names = CompVisNames(tensors)
    parts: Parts = {part: {} for part in PARTS}
    extra = {}
    for name, value in tensors.items():
        placed = names.place(name, value)
        for part, new, tensor in placed:
            parts[part][new] = tensor
        if not placed:
            extra[name] = value
    return parts, extra


def join_compvis(
    parts: Parts, *, v2: bool, extra: Mapping[str, Tensor] | None = None, old_clip_names: bool = False
) -> dict[str, Tensor]:
    """The reverse of `split_compvis`: a CompVis state dictionary, with `extra` as it is.

    Without an `extra` that holds it, OpenCLIP's unused last layer becomes a copy of the one before, and text_projection and
    logit_scale neutral values, since programs that read SD 2 files expect them.
    """
    result = {UNET_PREFIX + name: value for name, value in unet_to_compvis(parts["unet"]).items()}
    result |= {VAE_PREFIX + name: value for name, value in vae_to_compvis_all(parts["vae"]).items()}
    if v2:
        text = {OPEN_CLIP_PREFIX + name: value for name, value in clip_to_open_clip(parts["text_encoder"]).items()}
        if not extra or open_clip_layers(extra) == 0:
            text |= _unused_open_clip(text)
    else:
        prefix = OLD_CLIP_PREFIX if old_clip_names else CLIP_PREFIX
        text = {prefix + name: value for name, value in parts["text_encoder"].items()}
    return result | text | dict(extra or {})


def _unused_open_clip(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stand-ins for what an OpenCLIP file has beyond what SD 2 uses."""
    layers = open_clip_layers(text)
    last, new = f".resblocks.{layers - 1}.", f".resblocks.{layers}."
    like = text[OPEN_CLIP_PREFIX + "ln_final.weight"]
    copies = {re.sub(re.escape(last), new, name): value.clone() for name, value in text.items() if last in name}
    width = like.shape[0]
    return copies | {
        OPEN_CLIP_PREFIX + "text_projection": torch.ones(width, width, dtype=like.dtype, device=like.device),
        OPEN_CLIP_PREFIX + "logit_scale": torch.ones((), dtype=like.dtype, device=like.device),
    }


def _inside(names: Iterable[str], prefix: str) -> list[str]:
    return [name[len(prefix) :] for name in names if name.startswith(prefix)]
