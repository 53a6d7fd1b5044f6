"""Two stages: a small image first, for its composition, then the same enlarged and painted over for its details."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from library.errors import UserError
from library.generation.extras.image_input import SIDE_STEP, resized
from library.key_values import arguments_for
from library.network_modules import user_errors

if TYPE_CHECKING:
    from library.generation.options import HighresOptions
    from library.models.family import Model


@dataclass(frozen=True)
class Highres:
    """The values of --highres_fix_*.

    scale: of the first stage's sides; steps: of the first stage. strength: of the first stage where it begins from an image
    (None: the image's own). save_first_stage: yield it too. latent_upscaling: enlarge latents, not pixels. upscaler: see
    `load_upscaler`.
    The second stage runs the image's own steps times its `strength`, from noise of seed + 1.
    """

    scale: float
    steps: int = 28
    strength: float | None = None
    save_first_stage: bool = False
    latent_upscaling: bool = False
    upscaler: Any = None

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise UserError(f"--highres_fix_scale {self.scale}: give the first stage's share of the sides, above 0 and at most 1")
        if self.steps < 1:
            raise UserError(f"--highres_fix_steps {self.steps}: give at least 1")

    def first_size(self, width: int, height: int) -> tuple[int, int]:
        """Each side times the scale, rounded, then down to a multiple of 32."""
        small_width, small_height = (int(side * self.scale + 0.5) // SIDE_STEP * SIDE_STEP for side in (width, height))
        if min(small_width, small_height) < SIDE_STEP:
            raise UserError(f"--highres_fix_scale {self.scale}: too small a first stage of {width} x {height}; give a larger one")
        return small_width, small_height

    @property
    def keeps_latents(self) -> bool:
        """Whether the first stage is enlarged as latents."""
        return self.upscaler.support_latents() if self.upscaler is not None else self.latent_upscaling


def load_highres(chosen: HighresOptions, model: Model) -> Highres | None:
    """The settings of the two stages; None: there is one."""
    if chosen.highres_fix_scale is None:
        return None
    upscaler = None
    if chosen.highres_fix_upscaler:
        upscaler = load_upscaler(chosen.highres_fix_upscaler, chosen.highres_fix_upscaler_args, model)
    return Highres(
        chosen.highres_fix_scale, chosen.highres_fix_steps, chosen.highres_fix_strength, chosen.highres_fix_save_1st,
        chosen.highres_fix_latents_upscaling, upscaler,
    )  # fmt: skip


def load_upscaler(module_name: str, args: str | None, model: Model) -> Any:
    """What `create_upscaler(**args)` of the module of this name returns, on the model's device and in its dtype.

    It has `support_latents()`, whether it enlarges latents, and `upscale(vae, images, latents, dtype, width, height,
    batch_size, vae_batch_size)`, of which images or latents is None, and which returns images or latents of the new size.
    """
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"--highres_fix_upscaler {module_name}: {error}; give a module that imports from this folder") from error
    if not hasattr(module, "create_upscaler"):
        raise UserError(f"--highres_fix_upscaler {module_name} has no create_upscaler; give another module")
    words = arguments_for(module.create_upscaler, [args] if args else [], "--highres_fix_upscaler_args", read_other=str)
    with user_errors(f"--highres_fix_upscaler {module_name}"):
        upscaler = module.create_upscaler(**words)
    return upscaler.to(model.denoiser.dtype).to(model.denoiser.device)


def enlarge(
    highres: Highres, model: Model, images: list[Image.Image] | None, latents: Tensor | None, size: tuple[int, int],
    at_once: int,
) -> tuple[list[Image.Image] | None, Tensor | None]:  # fmt: skip
    """The first stage, images or latents (B, C, h, w), in the full size (width, height) in pixels; one of the two is None."""
    width, height = size
    if highres.upscaler is not None:
        count = len(images or []) if latents is None else len(latents)
        result = highres.upscaler.upscale(
            model.vae, images, latents, model.denoiser.dtype, width, height, batch_size=count, vae_batch_size=at_once
        )
        return (None, result.float()) if isinstance(result, torch.Tensor) else (list(result), None)
    if latents is not None:
        return None, F.interpolate(latents, model.latents.size(width, height), mode="bilinear", align_corners=False)
    return [resized(image, size) for image in images or []], None
