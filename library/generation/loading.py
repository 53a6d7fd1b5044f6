"""Loading the pipeline of a run: the model in its precision and on its device, with networks and all else that is attached."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.devices import use_xformers
from library.errors import UserError
from library.freed_memory import keep_freed_memory
from library.generation.extras.highres import load_highres
from library.generation.extras.networks import Networks
from library.generation.extras.regional import Regions
from library.generation.extras.vae_slices import slice_vae
from library.generation.options import GenerateOptions, ModelOptions, SpeedOptions
from library.generation.pipeline.image_state import check_process
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.sources import list_images
from library.models.clip import CHUNK, inner_text_model
from library.models.loading import load_stable_diffusion
from library.models.registry import check_family

if TYPE_CHECKING:
    from library.models.family import Model


def load_pipeline(options: GenerateOptions) -> Pipeline:
    """Everything that the options name, cheap checks first."""
    given = {
        "network_weights": options.network.network_weights,
        "textual_inversion_embeddings": options.model.textual_inversion_embeddings,
    }
    for option, files in given.items():
        for file in files or ():
            if not Path(file).exists():
                raise UserError(f"--{option} {file}: there is no such file")
    model = load_model(options.model, options.speed)
    check_process(model.process(options.model.zero_terminal_snr or None))
    networks = Networks.load(model, options.network)
    settings = GenerateSettings(
        batch_size=options.speed.batch_size,
        vae_batch_size=options.speed.vae_batch_size,
        clip_skip=options.model.clip_skip,
        max_token_length=CHUNK * (options.prompts.max_embeddings_multiples or 1),
        zero_terminal_snr=options.model.zero_terminal_snr or None,
        networks=networks,
        highres=load_highres(options.highres, model),
        regions=_load_regions(options, networks),
    )
    return Pipeline(model, settings)


def load_model(
    chosen: ModelOptions, speed: SpeedOptions, device: torch.device | str | None = None
) -> Model:  # fmt: skip
    """The model of --ckpt: a file, a Diffusers folder, a hub id, or a pattern such as `models/*-v3*` that one file matches.

    device: None takes the GPU if there is one.
    """
    device = torch.device(device) if device is not None else best_device()
    if speed.fp16 and device.type == "cpu":
        raise UserError("--fp16 needs a GPU and none was found; leave it out")
    if device.type == "cpu":
        keep_freed_memory()
    model = load_stable_diffusion(
        resolve_pattern(chosen.ckpt or ""), v2=chosen.v2, prediction="v" if chosen.v_parameterization else None, vae=chosen.vae,
        dtype=torch.float16 if speed.fp16 else torch.bfloat16 if speed.bf16 else torch.float32, device=device,
    )  # fmt: skip
    if model.prediction == "v" and not chosen.v_parameterization:
        ends = ", zero terminal SNR" if model.zero_terminal_snr else ""
        print(f"the model predicts velocity{ends}, as its files say: drawn so")
    if chosen.sdxl:
        check_family(model.name, model.family, "sdxl", "leave out --sdxl")
    _save_memory(model, speed, device)
    layers = len(inner_text_model(model.text_encoders[0]).encoder.layers)
    if (chosen.clip_skip or 1) > layers:
        raise UserError(f"--clip_skip {chosen.clip_skip}: the model's text encoder has {layers} layers; give 1 to {layers}")
    if chosen.textual_inversion_embeddings:
        from library.generation.extras.embeddings import add_embeddings

        words = add_embeddings(model, chosen.textual_inversion_embeddings)
        print(f"embeddings: {', '.join(words)}")
    return model


def _save_memory(model: Model, speed: SpeedOptions, device: torch.device) -> None:
    if speed.no_half_vae:
        model.vae.to(torch.float32)
    if speed.xformers or speed.diffusers_xformers:
        use_xformers(model.denoiser, device)
    if speed.opt_channels_last:
        for part in (model.denoiser, model.vae):
            part.to(memory_format=torch.channels_last)
    if speed.vae_tiling:
        model.vae.enable_tiling()
    if speed.vae_slices:
        slice_vae(model.vae, speed.vae_slices)


def best_device() -> torch.device:
    """The GPU, Apple's too, or else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_pattern(ckpt: str) -> str:
    """The one file or folder that a pattern matches; anything else as it is."""
    if Path(ckpt).exists() or not glob.has_magic(ckpt):
        return ckpt
    found = sorted(glob.glob(ckpt, recursive=True))
    if len(found) != 1:
        which = f"{len(found)} files, such as {found[0]} and {found[1]}" if found else "no file"
        raise UserError(f"--ckpt {ckpt} matches {which}; give a pattern that one file matches")
    return found[0]


def _load_regions(options: GenerateOptions, networks: Networks) -> Regions | None:
    """Where the mask shows where networks act, for all prompts or for those with sub-prompts alone."""
    if not options.means_regions("one AND another"):
        return None
    mask = list_images(options.source.mask_path, "--mask_path")[0]
    regions = Regions.load(mask, networks, options.network.network_regional_mask_max_color_codes)
    if options.means_regions("one"):
        regions.check_networks()
    return regions
