"""The family of models that a LoRA file is for, by the names and shapes of its tensors and by its metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from library.formats.families import FILE_FAMILIES, SD1, SD2, SDXL, FileFamily

Shapes = Mapping[str, tuple[int, ...]]

# Layers that only SDXL has, or only SD 1.x and 2.x, in the names of any layout, with underscores for dots.
_OF_SDXL = re.compile(
    r"lora_te2_|text_encoder_2_|clip_g_|(?:label_emb|add_embedding)_|transformer_blocks_[1-9]"
    r"|output_blocks_[012]_1_(?:norm|proj|transformer)|up_blocks_0_attentions_"
)
_OF_SD = re.compile(
    r"down_blocks_0_attentions_|(?:down|up)_blocks_3_|input_blocks_[12]_1_|(?:in|out)put_blocks_(?:9|1[01])_|clip_h_"
)
_HAS_WIDTH = r"(?:lora_(?:linear_layer_)?(?:down|A)(?:_\w+)?_weight|hada_w1_b|diff)"  # tensors of (rank or outputs, inputs)
_CROSS_ATTENTION = re.compile(r".*attn2_(?:processor_)?to_[kv]_" + _HAS_WIDTH)
_TEXT_ATTENTION = re.compile(r"(?:lora_te_|text_encoder_).*self_attn_[qkv]_proj_" + _HAS_WIDTH)
_CONTEXT_WIDTHS = {768: SD1, 1024: SD2, 2048: SDXL}  # of full-size models; other widths show nothing


def families_of_lora(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> tuple[FileFamily, ...]:
    """The families that a LoRA file with these tensors can be for: all of them if nothing shows it.

    Layers that only one family has count most, then the metadata, then widths. `ss_v2` comes last, since it is False in files
    for SDXL too.
    """
    metadata = metadata or {}
    names = {key.replace(".", "_"): shape for key, shape in shapes.items()}
    found = FILE_FAMILIES
    for sign in (_by_layers(names), _by_version(metadata), _by_widths(names), *_by_v2(metadata)):
        if both := tuple(family for family in found if family in sign):
            found = both
    return found


def _by_layers(names: Iterable[str]) -> tuple[FileFamily, ...]:
    names = list(names)
    if any(_OF_SDXL.search(name) for name in names):
        return (SDXL,)
    return (SD1, SD2) if any(_OF_SD.search(name) for name in names) else FILE_FAMILIES


def _by_version(metadata: Mapping[str, str]) -> tuple[FileFamily, ...]:
    version = metadata.get("ss_base_model_version", "").lower()
    starts = {"sd_v1": SD1, "sd_v2": SD2, "sdxl": SDXL}
    return tuple(family for start, family in starts.items() if version.startswith(start)) or FILE_FAMILIES


def _by_widths(names: Shapes) -> tuple[FileFamily, ...]:
    widths = {shape[1] for name, shape in names.items() if len(shape) > 1 and _CROSS_ATTENTION.fullmatch(name)}
    if found := tuple(family for width, family in _CONTEXT_WIDTHS.items() if width in widths):
        return found
    widths = {shape[1] for name, shape in names.items() if len(shape) > 1 and _TEXT_ATTENTION.fullmatch(name)}
    return tuple(family for width, family in _CONTEXT_WIDTHS.items() if width in widths) or FILE_FAMILIES


def _by_v2(metadata: Mapping[str, str]) -> tuple[tuple[FileFamily, ...], ...]:
    """Signs in order: False excludes 2.x; if that leaves several families, it means 1.x, as for web UIs."""
    v2 = metadata.get("ss_v2")
    return {"True": ((SD2,),), "False": ((SD1, SDXL), (SD1,))}.get(v2 or "", ())
