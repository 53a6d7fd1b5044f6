"""Models written back: as one file in CompVis layout, or as a Diffusers folder."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.diffusion.process import NoiseProcess
from library.errors import UserError
from library.files import atomic_write
from library.formats.compvis import CompVisNames, Parts, join_compvis
from library.formats.names import OLD_CLIP_PREFIX
from library.formats.tensor_file import MODEL_SUFFIXES, open_tensors
from library.formats.tensor_output import save_pickled
from library.models.clip import CLIP_BPE, VOCABULARY
from library.models.parts import StableDiffusion, text_weights


def save_stable_diffusion(
    model: StableDiffusion,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    numbers: Mapping[str, int] | None = None,
) -> None:
    """Write `model` to `path`: .safetensors or .ckpt in CompVis layout, any other name as a Diffusers folder.

    `dtype` None keeps each weight's own. If the model came from a CompVis file that is still there, that file's other tensors
    (noise schedule, OpenCLIP's 24th layer, averaged weights, ...) are carried over. `metadata` goes into the header
    of a .safetensors file; other formats have no place for it, so there it is an error. `numbers` (epoch, global_step) go into
    a .ckpt; without them those of the model's own file are carried over.
    """
    path = Path(path)
    parts = _parts(model, dtype)
    _refuse_nan(parts, path)
    if path.suffix.lower() not in MODEL_SUFFIXES:
        if metadata:
            raise UserError(f"{path}: a Diffusers folder has no place for metadata; save as .safetensors")
        _save_folder(model, parts, path)
        return
    extra, own_numbers, old_clip_names = _source_extras(model, dtype)
    tensors = join_compvis(parts, v2=model.v2, extra=extra, old_clip_names=old_clip_names)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    if path.suffix.lower() == ".safetensors":
        _save_safetensors(tensors, path, dict(metadata or {}))
    elif metadata:
        raise UserError(f"{path}: a {path.suffix} file has no place for metadata; save as .safetensors")
    else:
        with atomic_write(path) as temporary:
            save_pickled(tensors, temporary, numbers or own_numbers)


def _parts(model: StableDiffusion, dtype: torch.dtype | None) -> Parts:
    weights = {"unet": model.unet.state_dict(), "vae": model.vae.state_dict(), "text_encoder": text_weights(model.text_encoder)}
    return {part: {name: value.detach().to("cpu", dtype) for name, value in values.items()} for part, values in weights.items()}


def _refuse_nan(parts: Parts, path: Path) -> None:
    for part, values in parts.items():
        for name, value in values.items():
            if value.is_floating_point() and not value.isfinite().all():
                where = f"{name} of the {part.replace('_', ' ')}"
                raise UserError(f"{path} was not written: {where} holds values that are not finite")


def _source_extras(model: StableDiffusion, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """Tensors of the model's own CompVis file that are no part of it, its counters, and whether it names CLIP in the old way."""
    if model.path is None or not model.path.is_file():
        return {}, {}, False
    with open_tensors(model.path) as file:
        names = CompVisNames(file.shapes)
        extra = {
            # Names without a dot are the noise schedule's tables, which stay float32 in half-precision files too.
            name: file.read(name, dtype if "." in name else None)
            for name, shape in file.shapes.items()
            if not names.place(name, torch.empty(shape, device="meta"))
        }
        return extra, dict(file.numbers), names.text_prefix == OLD_CLIP_PREFIX


def _save_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt", **metadata})


def _save_folder(model: StableDiffusion, parts: Parts, path: Path) -> None:
    """Write the folder beside its place, then move it there whole. An older Diffusers model of that name is replaced."""
    if path.exists() and not ((path / "model_index.json").is_file() or path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is no Diffusers model; give another name or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    temporary, old = path.with_name(f".{path.name}.{unique}"), path.with_name(f".{path.name}.{unique}.old")
    try:
        _write_folder(model, parts, temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise UserError(f"cannot write {path}: {error.strerror or error}; check the folder, its rights and free space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_folder(model: StableDiffusion, parts: Parts, folder: Path) -> None:
    for part, module in (("unet", model.unet), ("vae", model.vae)):
        module.save_config(folder / part)
        _save_safetensors(parts[part], folder / part / "diffusion_pytorch_model.safetensors", {})
    model.text_encoder.config.save_pretrained(folder / "text_encoder")
    # Whatever the transformers version, the names on disk have `text_model.`: every program reads those.
    text = {f"text_model.{name}": value for name, value in parts["text_encoder"].items()}
    _save_safetensors(text, folder / "text_encoder" / "model.safetensors", {})
    _write_tokenizer(model, folder / "tokenizer")
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        _scheduler_config(NoiseProcess("v" if model.v_parameterization else "epsilon")),
    )
    _write_json(folder / "model_index.json", _model_index())


def _write_tokenizer(model: StableDiffusion, folder: Path) -> None:
    """vocab.json and merges.txt beside what this version of transformers writes, which older programs cannot read."""
    model.tokenizer.save_pretrained(folder)
    if len(model.tokenizer) == VOCABULARY:
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(CLIP_BPE / name, folder / name)


def _scheduler_config(process: NoiseProcess) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": _diffusers_version(),
        **process.scheduler_config(),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": _diffusers_version(),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _diffusers_version() -> str:
    import diffusers

    return diffusers.__version__


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
