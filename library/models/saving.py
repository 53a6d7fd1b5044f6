"""Saving models: as one file in CompVis layout, or as a Diffusers folder."""

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
from library.errors import UserError, one_line
from library.files import atomic_write
from library.formats.compvis import Parts, SingleFileNames, join_compvis
from library.formats.prediction import V_MARK, ZERO_SNR_MARK
from library.formats.tensor_file import MODEL_SUFFIXES, open_tensors
from library.formats.tensor_output import save_pickled
from library.models.clip import CLIP_BPE, VOCABULARY, path_in_files
from library.models.family import Family, Model
from library.models.modules import weights_of


def save_stable_diffusion(
    model: Model,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    counters: Mapping[str, int] | None = None,
) -> None:
    """Write `model` to `path`: .safetensors or .ckpt in CompVis layout, any other name as a Diffusers folder.

    `dtype` None keeps each weight's own. If the model's own CompVis file still exists, its other tensors (noise schedule,
    OpenCLIP's 24th layer, averaged weights, ...) are copied. `metadata` goes into the header of a .safetensors file; for other
    formats it raises UserError. `counters` (epoch, global_step) go into a .ckpt; without them those of the model's own file do.
    """
    path = Path(path)
    parts = _parts(model, dtype)
    _reject_nan(parts, path)
    if path.suffix.lower() not in MODEL_SUFFIXES:
        if metadata:
            raise UserError(f"{path}: a Diffusers folder has no place for metadata; save as .safetensors")
        _save_folder(model, parts, path)
        return
    extra, own_counters, prefixes = _source_extras(model, dtype)
    tensors = join_compvis(parts, model.family.layout, extra=extra, prefixes=prefixes) | _marks(model)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    if path.suffix.lower() == ".safetensors":
        _save_safetensors(tensors, path, dict(metadata or {}))
    elif metadata:
        raise UserError(f"{path}: a {path.suffix} file has no place for metadata; save as .safetensors")
    else:
        with atomic_write(path) as temporary:
            save_pickled(tensors, temporary, counters or own_counters)


def _marks(model: Model) -> dict[str, Tensor]:
    """Empty tensors that state the prediction, for families whose files have them."""
    is_marked = model.family.records.marks_prediction and model.prediction == "v"
    marks = {V_MARK: is_marked, ZERO_SNR_MARK: is_marked and model.zero_terminal_snr}
    return {name: torch.empty(0) for name, wanted in marks.items() if wanted}


def _parts(model: Model, dtype: torch.dtype | None) -> Parts:
    weights = {name: weights_of(module) for name, module in model.parts.items()}
    return {part: {name: value.detach().to("cpu", dtype) for name, value in values.items()} for part, values in weights.items()}


def _reject_nan(parts: Parts, path: Path) -> None:
    for part, values in parts.items():
        for name, value in values.items():
            if value.is_floating_point() and not value.isfinite().all():
                where = f"{name} of the {part.replace('_', ' ')}"
                raise UserError(f"{path} was not written: {where} holds values that are not finite")


def _source_extras(model: Model, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """From the model's own CompVis file: tensors that belong to no part, counters, and the prefixes of the parts."""
    if model.path is None or not model.path.is_file():
        return {}, {}, {}
    with open_tensors(model.path) as file:
        names = SingleFileNames(file.shapes, model.family.layout)
        extra = {
            # Names without a dot are the noise schedule's tables: float32 also in half-precision files.
            name: file.read(name, dtype if "." in name else None)
            for name, shape in file.shapes.items()
            if not names.to_parts(name, torch.empty(shape, device="meta"))
        }
        return extra, dict(file.counters), names.prefixes


def _save_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt", **metadata})


def _save_folder(model: Model, parts: Parts, path: Path) -> None:
    """Write the folder under a temporary name, then rename it. An existing Diffusers model is replaced."""
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


def _write_folder(model: Model, parts: Parts, folder: Path) -> None:
    tokenizers = iter(model.tokenizers)
    for part in model.family.parts:
        module, part_folder, weights = model.parts[part.name], folder / part.name, parts[part.name]
        if part.role == "text":
            module.config.save_pretrained(part_folder)
            # Every program reads names with `text_model.`, so they are written for every version of transformers.
            weights = {path_in_files(name): value for name, value in weights.items()}
            _write_tokenizer(next(tokenizers), folder / part.tokenizer)
        else:
            module.save_config(part_folder)
        _save_safetensors(weights, part_folder / f"{part.weight_files[0]}.safetensors", {})
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(model.process()))
    _write_json(folder / "model_index.json", _model_index(model.family))


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """vocab.json and merges.txt beside what this version of transformers writes, which older programs cannot read."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises plain exceptions, of a full disk too
        raise OSError(one_line(error)) from error
    if len(tokenizer) == VOCABULARY:
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(CLIP_BPE / name, folder / name)


def _scheduler_config(process: NoiseProcess) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": _diffusers_version(),
        **process.scheduler_config(),
        **({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if process.zero_terminal_snr else {}),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def _model_index(family: Family) -> dict[str, Any]:
    parts = {part.name: list(part.library) for part in family.parts}
    parts |= {part.tokenizer: ["transformers", "CLIPTokenizer"] for part in family.text_parts}
    return {
        "_class_name": family.pipeline,
        "_diffusers_version": _diffusers_version(),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        **dict(sorted(parts.items())),
    }


def _diffusers_version() -> str:
    import diffusers

    return diffusers.__version__


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
