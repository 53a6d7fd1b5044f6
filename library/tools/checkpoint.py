"""Checks of the checkpoint that a LoRA tool works on."""

from __future__ import annotations

from collections.abc import Sequence

from library.errors import UserError
from library.formats.families import FILE_FAMILIES, SD2, SDXL, FileFamily, family_of_checkpoint, titles
from library.formats.lora_file import LoraFile
from library.formats.names import UNET_PREFIX
from library.formats.tensor_file import TensorFile


def family_of_model(model: TensorFile, v2: bool = False, sdxl: bool = False) -> FileFamily:
    """The family of a checkpoint. UserError if it is none of a known family, or of another than `--v2` or `--sdxl` say."""
    found = family_of_checkpoint(model.shapes)
    if found is None or not any(name.startswith(UNET_PREFIX) for name in model.shapes):
        what = f"no checkpoint of {titles(FILE_FAMILIES)}"
        raise UserError(f"{model.path} is {what}: it lacks the U-Net or a text encoder; give the whole model")
    for option, meant in _options(v2, sdxl):
        if found is not meant:
            raise UserError(f"{model.path} is an {found.title} model; leave out {option}: the family is read from the file")
    return found


def check_family(loras: Sequence[LoraFile], v2: bool, sdxl: bool) -> None:
    """UserError if LoRAs are for another family than `--v2` or `--sdxl` say."""
    for option, meant in _options(v2, sdxl):
        if other := next((lora for lora in loras if meant not in lora.families), None):
            raise UserError(
                f"{other.path} is for {titles(other.families)}; leave out {option}: the family is read from the files"
            )


def _options(v2: bool, sdxl: bool) -> list[tuple[str, FileFamily]]:
    return [row for row, given in ((("--v2", SD2), v2), (("--sdxl", SDXL), sdxl)) if given]


def loras_for(model: TensorFile, family: FileFamily, loras: Sequence[LoraFile]) -> list[LoraFile]:
    """The LoRAs as ones for this model of a family. UserError if one is for another family."""
    for lora in loras:
        if family not in lora.families:
            raise UserError(f"{lora.path} is for {titles(lora.families)}, {model.path} is {family.title}; use a LoRA for that")
    return [lora.for_families([family]) for lora in loras]
