"""The size of an image that asks for none."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files import read_safetensors_metadata
from library.generation.extras.image_input import source_size
from library.generation.prompts.spec import PromptSpec

if TYPE_CHECKING:
    from library.models.family import Model


def size_of_spec(model: Model, spec: PromptSpec) -> tuple[int, int]:
    """Width and height: of the spec, or of the image that it starts from, or else the model's own."""
    if spec.width is not None and spec.height is not None:
        return spec.width, spec.height
    if spec.image is None:
        width, height = default_size(model)
        return spec.width or width, spec.height or height
    if spec.width is not None or spec.height is not None:
        raise UserError(f"give both --w and --h, or none to take the size of {spec.image}")
    return source_size(spec.image)


def default_size(model: Model) -> tuple[int, int]:
    """Width and height that the model was trained on: by its file, or else its architecture (512; SD 2 with velocity 768)."""
    if model.path is not None and model.path.suffix.lower() == ".safetensors" and model.path.is_file():
        sides = re.fullmatch(r"(\d+)x(\d+)", _resolution_in(model.path))
        if sides and all(int(side) >= 64 and int(side) % 8 == 0 for side in sides.groups()):
            return int(sides[1]), int(sides[2])
    side = model.denoiser.config.sample_size * model.latents.pixels_per_latent
    return side, side


@cache  # asked for every image
def _resolution_in(path: Path) -> str:
    return read_safetensors_metadata(path).get("modelspec.resolution", "")
