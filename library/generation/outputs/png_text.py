"""What is written into the images: fields of this suite, and `parameters`, which the A1111 web UI reads back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from library.diffusion.samplers import SAMPLERS
from library.errors import UserError
from library.files import read_safetensors_metadata, sha256_of_file
from library.generation.prompts.loras import split_loras
from library.generation.prompts.spec import PromptSpec

if TYPE_CHECKING:
    from library.generation.options import GenerateOptions
    from library.generation.pipeline.pipeline import Pipeline


class UsedLora(NamedTuple):
    """A network that acted on an image."""

    name: str
    strength: float
    hash: str  # 12 hex digits, the web UI's


@dataclass(frozen=True)
class RunFacts:
    """What is the same for all images of a run."""

    model_name: str
    model_hash: str | None = None  # 10 hex digits, the web UI's; None for folders and models of the hub
    clip_skip: int | None = None
    vae: str | None = None
    highres_steps: int | None = None
    upscaler: str | None = None


def run_facts(options: GenerateOptions, pipeline: Pipeline) -> RunFacts:
    """What all images of this run have in common. Reads the whole model file, for its hash: seconds for gigabytes."""
    model, highres = pipeline.model, pipeline.settings.highres
    name = model.path.stem if model.path is not None and model.path.is_file() else Path(model.name).name
    own = "Latent" if highres is not None and highres.keeps_latents else "Lanczos"
    return RunFacts(
        model_name=name, model_hash=model_hash(model.path), clip_skip=options.model.clip_skip,
        vae=options.model.vae and Path(options.model.vae).name, highres_steps=highres.steps if highres is not None else None,
        upscaler=options.highres.highres_fix_upscaler or own,
    )  # fmt: skip


def text_fields(
    spec: PromptSpec, raw: str, facts: RunFacts, loras: Sequence[UsedLora], stage: int | None, first_size: tuple[int, int] | None
) -> dict[str, str]:
    """All fields of one image. stage: None without highres fix, 0 its first stage (of `first_size`), 1 the final image."""
    steps = facts.highres_steps if stage == 0 else spec.steps
    fields = {
        "prompt": spec.prompt, "seed": str(spec.seed), "sampler": spec.sampler, "steps": str(steps), "scale": f"{spec.scale:g}",
        "negative-prompt": spec.negative_prompt,
    }  # fmt: skip
    if spec.negative_scale is not None:
        fields["negative-scale"] = f"{spec.negative_scale:g}"
    fields |= {name.replace("_", "-"): str(value) for name, value in vars(spec.sizes).items() if value}
    return fields | {"raw-prompt": raw, "parameters": parameters(spec, facts, loras, stage, first_size)}


def parameters(
    spec: PromptSpec, facts: RunFacts, loras: Sequence[UsedLora] = (), stage: int | None = None,
    first_size: tuple[int, int] | None = None,
) -> str:  # fmt: skip
    """The text that the web UI shows below an image and reads back: prompt, negative prompt, one line of `Key: value`.

    Networks stand in the prompt as `<lora:name:strength>`, as the web UI writes them; one that the prompt already calls
    gets a tag for the rest of its strength, if there is any.
    """
    lines = [_one_line(" ".join([spec.prompt, *_tags(spec.prompt, loras)]))]
    if spec.negative_prompt:
        lines.append(f"Negative prompt: {_one_line(spec.negative_prompt)}")
    values = _settings(spec, facts, loras, stage, first_size)
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in values.items())])


def _tags(prompt: str, loras: Sequence[UsedLora]) -> list[str]:
    """What the prompt lacks to name all networks with their whole strength."""
    called: dict[str, float] = {}
    for name, strength in split_loras(prompt)[1]:
        called[name] = called.get(name, 0.0) + strength
    missing = [(lora.name, f"{lora.strength - called.pop(lora.name, 0.0):.6g}") for lora in loras]
    return [f"<lora:{name}:{strength}>" for name, strength in missing if abs(float(strength)) > 1e-6]


def _settings(
    spec: PromptSpec, facts: RunFacts, loras: Sequence[UsedLora], stage: int | None, first_size: tuple[int, int] | None
) -> dict[str, str]:
    # In the web UI steps and size are those of the first stage, and those of the second begin with "Hires".
    width, height = (spec.width, spec.height) if stage is None or first_size is None else first_size
    values = {
        "Steps": str(spec.steps if stage is None else facts.highres_steps),
        "Sampler": SAMPLERS[spec.sampler].web_ui_name,
        "CFG scale": f"{spec.scale:g}",
        "Seed": str(spec.seed),
        "Size": f"{width}x{height}",
        "Model hash": facts.model_hash or "",
        "Model": facts.model_name,
        "VAE": facts.vae or "",
        "Denoising strength": f"{spec.strength:g}" if spec.image or stage == 1 else "",
        "Clip skip": str(facts.clip_skip) if (facts.clip_skip or 1) > 1 else "",
    }
    if stage == 1:
        full_size = f"{spec.width}x{spec.height}"
        values |= {"Hires resize": full_size, "Hires steps": str(spec.steps), "Hires upscaler": facts.upscaler or ""}
    values["Lora hashes"] = ", ".join(f"{lora.name}: {lora.hash}" for lora in loras)
    values["RNG"] = "CPU"  # where the start noise is drawn
    return {key: value for key, value in values.items() if value}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _quoted(value: str) -> str:
    """As the web UI does: in double quotes where the value itself holds what separates values."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value


def model_hash(path: Path | None) -> str | None:
    """10 hex digits over a file; None for a folder or a model of the hub."""
    return sha256_of_file(path)[:10] if path is not None and path.is_file() else None


def loras_with_hashes(used: Sequence[tuple[Path, float]]) -> list[UsedLora]:
    """Names, strengths and hashes of the files that acted on an image, each once: strengths of one file add up."""
    strengths: dict[Path, float] = {}
    for path, strength in used:
        strengths[path] = strengths.get(path, 0.0) + strength
    return [UsedLora(path.stem, strength, lora_hash(path)) for path, strength in strengths.items()]


@cache  # a file is read once a run
def lora_hash(path: Path) -> str:
    """12 hex digits: of the tensors, as the file's metadata have it or counted anew; of all of a file that is no .safetensors."""
    if path.suffix.lower() != ".safetensors":
        return sha256_of_file(path)[:12]
    try:
        stored = read_safetensors_metadata(path).get("sshs_model_hash")
    except UserError:
        stored = None
    if stored:
        return stored[:12]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]
