"""Checks of the checkpoint that a LoRA tool works on."""

from __future__ import annotations

from collections.abc import Sequence

from library.errors import UserError
from library.formats.lora_file import LoraFile
from library.formats.lora_targets import is_v2
from library.formats.names import UNET_PREFIX
from library.formats.tensor_file import TensorFile


def check_model(model: TensorFile, v2: bool, loras: Sequence[LoraFile]) -> None:
    """UserError if the checkpoint is of another generation than said, or than the LoRAs are for."""
    found = is_v2(model.shapes)
    if any(name.startswith("conditioner.") for name in model.shapes):
        raise UserError(f"{model.path} is an SDXL checkpoint; only Stable Diffusion 1.x and 2.x can be used")
    if found is None or not any(name.startswith(UNET_PREFIX) for name in model.shapes):
        raise UserError(f"{model.path} is no Stable Diffusion checkpoint: it lacks the U-Net or the text encoder")
    if found != v2:
        raise UserError(
            f"{model.path} is a Stable Diffusion {'2.x' if found else '1.x'} model; {'add' if found else 'leave out'} --v2"
        )
    for lora in loras:
        if lora.v2 not in (None, found):
            raise UserError(
                f"{lora.path} is for SD {'2.x' if lora.v2 else '1.x'}, {model.path} is SD {'2.x' if found else '1.x'}"
            )
