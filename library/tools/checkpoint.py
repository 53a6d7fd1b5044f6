"""Checks that a checkpoint and LoRAs are of one family."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from library.errors import UserError
from library.formats.families import FILE_FAMILIES, SD2, SDXL, FileFamily, family_of_checkpoint, titles
from library.formats.foreign import instead_of_a_model, packed_model
from library.formats.lora_file import LoraFile
from library.formats.names import UNET_PREFIX, unet_layout
from library.formats.tensor_file import TensorFile


def family_of_model(model: TensorFile, v2: bool = False, sdxl: bool = False) -> FileFamily:
    """The family of a checkpoint. Raises UserError if it is unknown, or contradicts `--v2` or `--sdxl`."""
    found = family_of_checkpoint(model.shapes)
    if found is None or not any(name.startswith(UNET_PREFIX) for name in model.shapes):
        what = f"no checkpoint of {titles(FILE_FAMILIES)}: it lacks the U-Net or a text encoder; give the whole model"
        raise UserError(f"{model.path} is {instead_of_a_model(model.shapes) or what}")
    if packed := packed_model(model.shapes):
        raise UserError(f"{model.path} is {packed}")
    for option, family in _given_families(v2, sdxl):
        if found is not family:
            raise UserError(f"{model.path} is an {found.title} model; leave out {option}: the family is read from the file")
    return found


def check_family(loras: Sequence[LoraFile], v2: bool, sdxl: bool) -> None:
    """Raises UserError if the family of a LoRA contradicts `--v2` or `--sdxl`."""
    for option, family in _given_families(v2, sdxl):
        if other := next((lora for lora in loras if family not in lora.families), None):
            raise UserError(
                f"{other.path} is for {titles(other.families)}; leave out {option}: the family is read from the files"
            )


def _given_families(v2: bool, sdxl: bool) -> list[tuple[str, FileFamily]]:
    return [row for row, given in ((("--v2", SD2), v2), (("--sdxl", SDXL), sdxl)) if given]


def loras_for(model: TensorFile, family: FileFamily, loras: Sequence[LoraFile]) -> list[LoraFile]:
    """The LoRAs with the layer names of this family. Raises UserError if one is for another family than the model."""
    for lora in loras:
        if family not in lora.families:
            raise UserError(f"{lora.path} is for {titles(lora.families)}, {model.path} is {family.title}; use a LoRA for that")
    resnets = unet_layout(name.removeprefix(UNET_PREFIX) for name in model.shapes if name.startswith(UNET_PREFIX)).layers
    return [lora.for_families([family], resnets) for lora in loras]


def warn_of_open_blocks(loras: Sequence[LoraFile], cure: str) -> None:
    """Warn of files whose layers are in other blocks in one U-Net of the family than in another, unless another file shows it.

    For tools that have no model, whose blocks decide.
    """
    for lora in loras:
        if lora.leaves_blocks_open and not any(other.resnets for other in loras):
            print(f"warning: {lora.path} does not show whether it is for SDXL or KOALA; taken for SDXL: {cure}", file=sys.stderr)
