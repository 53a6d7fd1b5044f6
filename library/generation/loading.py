"""The model for a run of images: in which precision, on which device, with which savings of memory."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.devices import use_xformers
from library.diffusion.process import Prediction
from library.errors import UserError
from library.freed_memory import keep_freed_memory
from library.models.loading import load_stable_diffusion

if TYPE_CHECKING:
    from library.models.family import Model


def load_model(
    ckpt: str, *, v2: bool | None = None, prediction: Prediction | None = None, vae: str | None = None,
    dtype: torch.dtype = torch.float32,
    no_half_vae: bool = False, device: torch.device | str | None = None, xformers: bool = False, channels_last: bool = False,
    vae_tiling: bool = False,
) -> Model:  # fmt: skip
    """The model of --ckpt: a file, a Diffusers folder, a hub id, or a pattern such as `models/*-v3*` that one file matches.

    no_half_vae: the VAE stays in float32. device: None takes the GPU if there is one. vae_tiling: the VAE works in overlapping
    tiles, which takes less memory for large images and changes them a little where tiles meet.
    """
    device = torch.device(device) if device is not None else best_device()
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("--fp16 needs a GPU and none was found; leave it out")
    if device.type == "cpu":
        keep_freed_memory()
    model = load_stable_diffusion(resolve_pattern(ckpt), v2=v2, prediction=prediction, vae=vae, dtype=dtype, device=device)
    if no_half_vae:
        model.vae.to(torch.float32)
    if xformers:
        use_xformers(model.denoiser, device)
    if channels_last:
        for part in (model.denoiser, model.vae):
            part.to(memory_format=torch.channels_last)
    if vae_tiling:
        model.vae.enable_tiling()
    return model


def best_device() -> torch.device:
    """The GPU, Apple's too, or else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_pattern(ckpt: str) -> str:
    """The one file or folder that a pattern matches; anything else as it is."""
    if Path(ckpt).exists() or not glob.has_magic(ckpt):
        return ckpt
    found = sorted(glob.glob(ckpt, recursive=True))
    if len(found) != 1:
        which = f"{len(found)} files, such as {found[0]} and {found[1]}" if found else "no file"
        raise UserError(f"--ckpt {ckpt} matches {which}; give a pattern that one file matches")
    return found[0]
