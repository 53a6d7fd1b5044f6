"""What a file of weights is, told by its names, so that a wrong one is refused by its own name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from library.errors import UserError
from library.formats.foreign import instead_of_a_model
from library.formats.names import UNET_PREFIX

_INPUT_CHANNELS = {
    9: "an in-painting model (9 input channels)",
    8: "an instruct-pix2pix model (8 input channels)",
    7: "an upscaler (7 input channels)",
    5: "a depth model (5 input channels)",
}


def refuse_other_families(path: Path, names: Iterable[str]) -> None:
    """Raise UserError unless these are the names of a whole SD 1 or 2 model in CompVis layout."""
    names = list(names)
    if not names:
        raise UserError(f"{path} holds no tensors; it is no model file")
    if what := instead_of_a_model(names):
        raise UserError(f"{path} is {what}")
    if any(name.startswith(UNET_PREFIX + "input_blocks.") for name in names):
        return
    if any(name.startswith(("down_blocks.", "encoder.", "text_model.", "first_stage_model.")) for name in names):
        raise UserError(f"{path} is one part of a model, not a whole one; give the whole file or the folder of all parts")
    raise UserError(f"{path} is no Stable Diffusion model: it holds {len(names)} tensors such as {names[0]}")


def refuse_other_inputs(source: str, channels: int) -> None:
    """Raise UserError unless the U-Net takes plain latents of 4 channels."""
    if channels != 4:
        what = _INPUT_CHANNELS.get(channels, f"a model with {channels} input channels")
        raise UserError(f"{source} is {what}, which is not supported; use the plain text-to-image model it was made from")


def check_generation(source: str, found_v2: bool, v2: bool) -> None:
    """Raise UserError if the user's `--v2` does not fit the model."""
    if found_v2 and not v2:
        raise UserError(f"{source} is an SD 2.x model; add --v2 (and --v_parameterization if it is one for 768 px)")
    if v2 and not found_v2:
        raise UserError(f"{source} is an SD 1.x model; leave out --v2")
