"""What a wrong file is instead: told by its first bytes, or by the names of its tensors. One table, for models and LoRAs."""

from __future__ import annotations

from collections.abc import Iterable

# What the first bytes of files that hold no tensors give away.
_BEGINNINGS = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"<", "a web page; the download gave an error or login page instead of the model"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself; run `git lfs pull`"),
    (b"%PDF", "a PDF document"),
    (b"GGUF", "a GGUF file, a format of other programs"),
)

# A piece of a tensor's name -> what such a file is. The first that is found counts.
_OTHER_MODELS = {
    "conditioner.embedders.": "a Stable Diffusion XL model",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 model",
    "double_blocks.": "a Flux model",
}
_WHOLE_MODELS = {
    "model.diffusion_model.": "a whole model",
    "down_blocks.0.resnets.0.conv1.weight": "a whole U-Net",
}
_LORA_KINDS = {
    ".hada_": "a LoHa file (LyCORIS)",
    ".lokr_": "a LoKr file (LyCORIS)",
    ".oft_": "an OFT file",
    ".on_input": "an IA3 file (LyCORIS)",
    ".lora_mid.": "a LoCon file with Tucker decomposition (LyCORIS)",
    ".diff": "a file with full differences (LyCORIS)",
    "lora_te1_": "a LoRA for SDXL",
    "lora_te2_": "a LoRA for SDXL",
    "text_encoder_2.": "a LoRA for SDXL",
    "lora_unet_input_blocks_": "a LoRA for SDXL",
    "lora_unet_double_blocks_": "a LoRA for Flux",
    "lora_unet_joint_blocks_": "a LoRA for SD 3",
    "transformer.": "a LoRA for another family of models",
    ".dora_scale": "a DoRA file (LyCORIS)",
    ".lora_magnitude_vector": "a DoRA file",
}
_ANY_LORA = ("lora_unet_", "lora_te", ".lora_A.", ".lora_down.", ".lora.down.")
_OTHER_FILES = {
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "emb_params": "a textual inversion embedding",
    "string_to_param": "a textual inversion embedding",
}


def file_kind(start: bytes) -> str | None:
    """What a file that begins with these bytes is, if it is known and holds no tensors: `a web page; ...`."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "a WebP picture"
    return next((what for beginning, what in _BEGINNINGS if start.lstrip().startswith(beginning)), None)


def instead_of_a_model(names: Iterable[str]) -> str | None:
    """What a file with these tensors is instead of an SD 1.x or 2.x model, with the cure; None if nothing gives it away.

    >>> instead_of_a_model(["control_model.input_hint_block.0.weight"])
    'a ControlNet, not a model; use an SD 1.x or 2.x model'
    """
    names = list(names)
    if found := _first(_OTHER_MODELS, names):
        return f"{found[0]}, which is another family; use an SD 1.x or 2.x model"
    if any(mark in name for mark in _ANY_LORA for name in names):
        return "a LoRA, not a model; give it where a LoRA is asked for and here the model it was trained on"
    found = _first(_OTHER_FILES, names)
    return f"{found[0]}, not a model; use an SD 1.x or 2.x model" if found else None


def instead_of_a_lora(names: Iterable[str]) -> tuple[str, str] | None:
    """What a file with these tensors is instead of a plain LoRA for SD 1.x or 2.x, and the name that gives it away.

    >>> instead_of_a_lora(["lora_te1_x.lora_down.weight"])
    ('a LoRA for SDXL', 'lora_te1_x.lora_down.weight')
    """
    names = list(names)
    for table in (_WHOLE_MODELS, _LORA_KINDS, _OTHER_FILES):
        if found := _first(table, names):
            return (found[0] if table is _LORA_KINDS else f"{found[0]}, not a LoRA"), found[1]
    return None


def _first(table: dict[str, str], names: list[str]) -> tuple[str, str] | None:
    """The first row of the table whose mark is in a name, and that name."""
    return next(((what, name) for mark, what in table.items() for name in names if mark in name), None)
