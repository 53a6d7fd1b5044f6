"""Recognition of wrong files by their first bytes or the names of their tensors. One table, for models and LoRAs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_UNPACK = "unpack it and give the file of weights that is in it"
PLAIN_ARCHIVE = f"a zip archive of files, not of tensors; {_UNPACK}"

# First bytes of files without tensors -> what such a file is.
_BEGINNINGS = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"<", "a web page; the download gave an error or login page instead of the model"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself; run `git lfs pull`"),
    (b"%PDF", "a PDF document"),
    (b"GGUF", "a GGUF file, a format of other programs; get the .safetensors file of the model"),
    (b"{", "a JSON file, which only describes weights; give the weights themselves"),
    (b"Rar!", f"a RAR archive; {_UNPACK}"),
    (b"7z\xbc\xaf", f"a 7z archive; {_UNPACK}"),
    (b"\x1f\x8b", f"a gzip archive; {_UNPACK}"),
)

# A part of a tensor's name -> what such a file is. The first match counts.
_OTHER_MODELS = {
    "conditioner.embedders.0.model.": "the refiner of SDXL",
    "edm_vpred.sigma_max": "an EDM model that predicts velocity (CosXL)",
    "edm_mean": "an EDM model (Playground v2.5)",
    "encoder_hid_proj.": "a Kolors model",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 model",
    "double_blocks.": "a Flux model",
}
# The same of models whose weights are no plain numbers.
_PACKED_MODELS = {
    ".scale_weight": "in scaled 8 bits of ComfyUI",
    ".weight_scale": "in scaled 8 bits of ComfyUI",
    ".quant_state.bitsandbytes": "in 4 bits of bitsandbytes",
}
# A part of the class name of a Diffusers folder's pipeline -> what the folder is.
_OTHER_PIPELINES = {
    "Kolors": "a Kolors model",
    "Diffusion3": "a Stable Diffusion 3 model",
    "Flux": "a Flux model",
}
_ANOTHER_FAMILY = "which is another family; use an SD 1.x, SD 2.x or SDXL model"
_WHOLE_MODELS = {
    "model.diffusion_model.": "a whole model",
    "down_blocks.0.resnets.0.conv1.weight": "a whole U-Net",
}
_OTHER_LORA = "a LoRA for another family of models"
_LORA_KINDS = {
    "lora_unet_double_blocks_": "a LoRA for Flux",
    "lora_unet_joint_blocks_": "a LoRA for SD 3",
    "lora_transformer_": _OTHER_LORA,
    "lora_prior_unet_": "a LoRA for Stable Cascade",
    "^lora_unet_blocks_": _OTHER_LORA,
    "^lora_unet_layers_": _OTHER_LORA,
    "^transformer.": _OTHER_LORA,
    "^diffusion_model.blocks.": _OTHER_LORA,
    "^diffusion_model.layers.": _OTHER_LORA,
    "^base_model.model.transformer_blocks.": _OTHER_LORA,
    ".lambda_layer": "a T-LoRA, which changes with the noise of the step, so that LyCORIS' own loader alone can use it",
    ".oft_R.": "an OFT of version 2, which the program that made it (peft, OneTrainer) can merge into a model",
    ":up": "a LoRA of cloneofsimo's trainer, without names of layers, which that program can merge into a model",
}
_ANY_LORA = ("lora_unet_", "lora_te", ".lora_A.", ".lora_down.", ".lora.down.")
_EMBEDDING = "a textual inversion embedding (gen_img takes it with --textual_inversion_embeddings)"
_OTHER_FILES = {
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "emb_params": _EMBEDDING,
    "string_to_param": _EMBEDDING,
    "^clip_l$": _EMBEDDING,
    "^clip_g$": _EMBEDDING,
    "lllite_unet_": "a ControlNet-LLLite",
    "ip_adapter.": "an IP-Adapter",
    "motion_modules.": "a motion module of AnimateDiff",
    "params_ema": "an upscaler",
}
_PARTS = {
    "^text_model.embeddings.": "a text encoder",
    "^encoder.conv_in.": "a VAE",
    "^decoder.conv_in.": "a VAE",
}


def file_kind(start: bytes) -> str | None:
    """What a file with these first bytes is, such as `a web page; ...`; None if it is unknown or may hold tensors."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "a WebP image; give a file of weights instead"
    what = next((what for beginning, what in _BEGINNINGS if start.lstrip().startswith(beginning)), None)
    return what if what is None or ";" in what else f"{what}; give a file of weights instead"


def instead_of_a_model(names: Iterable[str]) -> str | None:
    """What a file with these tensors is instead of a model of a known family, with the cure; None if it is not recognised.

    >>> instead_of_a_model(["control_model.input_hint_block.0.weight"])
    'a ControlNet, not a model; use an SD 1.x, SD 2.x or SDXL model'
    """
    names = list(names)
    if found := _first(_OTHER_MODELS, names):
        return f"{found[0]}, {_ANOTHER_FAMILY}"
    if what := packed_model(names):
        return what
    if any(mark in name for mark in _ANY_LORA for name in names):
        return "a LoRA, not a model; give it where a LoRA is asked for and here the model it was trained on"
    found = _first(_OTHER_FILES, names)
    return f"{found[0]}, not a model; use an SD 1.x, SD 2.x or SDXL model" if found else None


def packed_model(names: Iterable[str]) -> str | None:
    """What a model is whose weights have to be unpacked before they are numbers, with the cure; None if nothing gives it away."""
    found = _first(_PACKED_MODELS, list(names))
    return f"a model {found[0]}, which other programs cannot read; use the fp16 file of the model" if found else None


def instead_of_a_folder(pipeline: str, configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The same for a Diffusers folder, by the class of its pipeline and the configurations of its parts and its scheduler."""
    what = next((what for mark, what in _OTHER_PIPELINES.items() if mark in pipeline), None)
    if str(configs.get("scheduler", {}).get("_class_name", "")).startswith("EDM"):
        what = "an EDM model (CosXL, for example)"
    if configs.get("vae", {}).get("latents_mean"):
        what = "an EDM model (Playground v2.5)"
    if "text_encoder_2" in configs and "text_encoder" not in configs:
        what = "the refiner of SDXL"
    return f"{what}, {_ANOTHER_FAMILY}" if what else None


def instead_of_a_lora(names: Iterable[str]) -> tuple[str, str] | None:
    """What a file with these tensors is instead of an adapter of a known family, and the name that shows it.

    >>> instead_of_a_lora(["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"])
    ('a LoRA for Flux', 'lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight')
    """
    names = [name for name in names if not name.startswith("bundle_emb.")]  # embeddings that OneTrainer puts beside a LoRA
    is_lora = any(mark in name for mark in _ANY_LORA for name in names)
    for table in (_LORA_KINDS, *([] if is_lora else [_OTHER_FILES, _WHOLE_MODELS, _PARTS])):
        if found := _first(table, names):
            return (found[0] if table is _LORA_KINDS else f"{found[0]}, not a LoRA"), found[1]
    return None


def instead_of_tensors(names: Iterable[str]) -> str | None:
    """What a pickled file with these entries, of which none is a tensor, is instead; None if nothing gives it away."""
    found = _first(_OTHER_FILES, list(names))
    return f"{found[0]}, no model or LoRA" if found else None


def _first(table: dict[str, str], names: list[str]) -> tuple[str, str] | None:
    """The first row of the table whose mark is in a name, and that name; `^` and `$` match a name's beginning and end."""
    return next(((what, name) for mark, what in table.items() for name in names if mark in f"^{name}$"), None)
