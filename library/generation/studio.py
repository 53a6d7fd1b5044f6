"""The model of a run with everything that is attached to it, ready to make images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from library.errors import UserError
from library.files import read_safetensors_header
from library.generation.encoding import PromptCache
from library.generation.generator import Made, generate
from library.generation.highres import Highres, load_upscaler
from library.generation.image_input import source_size
from library.generation.loading import load_model
from library.generation.networks import Networks
from library.generation.options import GenerateOptions
from library.generation.plan import Request
from library.generation.png_text import RunFacts, model_hash
from library.generation.prompt_sources import list_images
from library.generation.prompts import PromptSpec
from library.generation.regional import Regions
from library.generation.vae_slices import slice_vae
from library.models.clip import CHUNK, inner_text_model
from library.models.family import Model

DEFAULT_NETWORK_MODULE = "networks.lora"


class Studio:
    """Loads what the options name, cheap checks first, and makes images with it."""

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options
        self.model = _load(options)
        self.networks = _load_networks(options, self.model)
        self.highres = _highres(options, self.model)
        self.regions = _regions(options, self.networks)
        self.width, self.height = default_size(self.model)
        self._texts = PromptCache()

    def spec(self, request: Request) -> PromptSpec:
        """What the request's line sets, its seed, and for all else the command line and the size of the source or the model."""
        image, source = self.options.image, self.options.source
        width, height = image.W, image.H
        if request.source is not None:
            given = {"width", "height"} & request.line.values.keys()
            if len(given) == 1 and width is None:
                raise UserError(f"{request.where}: give both --w and --h, or none to take the size of {request.source}")
            if not given and width is None:
                width, height = source_size(request.source)
        defaults = PromptSpec(
            width=width or self.width, height=height or self.height, scale=image.scale, steps=image.steps,
            sampler=image.sampler, negative_scale=image.negative_scale, seed=request.seed, image=request.source,
            mask=request.mask, strength=0.8 if source.strength is None else source.strength,
        )  # fmt: skip
        return request.line.spec(defaults, self._shrink_defaults())

    def _shrink_defaults(self) -> dict[str, float | None]:
        chosen = self.options.deep_shrink
        return {
            "depth_1": chosen.ds_depth_1, "timestep_1": chosen.ds_timesteps_1, "depth_2": chosen.ds_depth_2,
            "timestep_2": chosen.ds_timesteps_2, "ratio": chosen.ds_ratio,
        }  # fmt: skip

    def draw(
        self, specs: list[PromptSpec], progress: Callable[[float], object], on_error: Callable[[PromptSpec, UserError], object]
    ) -> Iterator[Made]:
        """The images in order; those that fail go to `on_error`."""
        prompts, speed = self.options.prompts, self.options.speed
        return generate(
            self.model, specs, batch_size=speed.batch_size, vae_batch_size=speed.vae_batch_size,
            clip_skip=self.options.model.clip_skip, max_token_length=CHUNK * (prompts.max_embeddings_multiples or 1),
            zero_terminal_snr=self.options.model.zero_terminal_snr or None, networks=self.networks, highres=self.highres,
            regions=self.regions, texts=self._texts, progress=progress, on_error=on_error,
        )  # fmt: skip

    def facts(self) -> RunFacts:
        """What all images of this run have in common. Reads the whole model file, for its hash: seconds for gigabytes."""
        chosen, model = self.options.model, self.model
        name = model.path.stem if model.path is not None and model.path.is_file() else Path(model.name).name
        own = "Latent" if self.highres and self.highres.keeps_latents else "Lanczos"
        return RunFacts(
            model_name=name, model_hash=model_hash(model.path), clip_skip=chosen.clip_skip,
            vae=chosen.vae and Path(chosen.vae).name, highres_steps=self.highres and self.highres.steps,
            upscaler=self.options.highres.highres_fix_upscaler or own,
        )  # fmt: skip

    def used(self, spec: PromptSpec) -> list[tuple[Path, float]]:
        """The files of networks that act on this image, with their strengths."""
        return self.networks.used(spec)

    def first_size(self, spec: PromptSpec) -> tuple[int, int] | None:
        """Size of the first of two stages; None where there is one."""
        return self.highres.first_size(spec.width, spec.height) if self.highres else None


def default_size(model: Model) -> tuple[int, int]:
    """Width and height that the model was made for: as its file says, or else its architecture (512; SD 2 with velocity 768)."""
    if model.path is not None and model.path.suffix.lower() == ".safetensors" and model.path.is_file():
        said = read_safetensors_header(model.path).get("__metadata__", {}).get("modelspec.resolution", "")
        sides = re.fullmatch(r"(\d+)x(\d+)", said)
        if sides and all(int(side) >= 64 and int(side) % 8 == 0 for side in sides.groups()):
            return int(sides[1]), int(sides[2])
    side = model.denoiser.config.sample_size * model.latents.pixels_per_latent
    return side, side


def _load(options: GenerateOptions) -> Model:
    chosen, speed = options.model, options.speed
    for file in [*(options.network.network_weights or ()), *(chosen.textual_inversion_embeddings or ())]:
        if not Path(file).exists():
            option = "--network_weights" if file in (options.network.network_weights or ()) else "--textual_inversion_embeddings"
            raise UserError(f"{option} {file}: there is no such file")
    model = load_model(
        chosen.ckpt, v2=chosen.v2, prediction="v" if chosen.v_parameterization else None, vae=chosen.vae,
        dtype=torch.float16 if speed.fp16 else torch.bfloat16 if speed.bf16 else torch.float32, no_half_vae=speed.no_half_vae,
        xformers=speed.xformers or speed.diffusers_xformers, channels_last=speed.opt_channels_last, vae_tiling=speed.vae_tiling,
    )  # fmt: skip
    layers = len(inner_text_model(model.text_encoders[0]).encoder.layers)
    if (chosen.clip_skip or 1) > layers:
        raise UserError(f"--clip_skip {chosen.clip_skip}: the model's text encoder has {layers} layers; give 1 to {layers}")
    if speed.vae_slices:
        slice_vae(model.vae, speed.vae_slices)
    if chosen.textual_inversion_embeddings:
        from library.generation.embeddings import add_embeddings

        words = add_embeddings(model, chosen.textual_inversion_embeddings)
        print(f"embeddings: {', '.join(words)}")
    return model


def _load_networks(options: GenerateOptions, model: Model) -> Networks:
    chosen = options.network
    files = chosen.network_weights or []
    modules = chosen.network_module or ([DEFAULT_NETWORK_MODULE] if files else [])
    return Networks.load(
        modules, files, chosen.network_mul, chosen.network_args, model=model, merge=chosen.network_merge,
        merge_first=chosen.network_merge_n_models, pre_calc=chosen.network_pre_calc, show_metadata=chosen.network_show_meta,
        lora_dir=Path(chosen.lora_dir) if chosen.lora_dir else None,
    )  # fmt: skip


def _highres(options: GenerateOptions, model: Model) -> Highres | None:
    chosen = options.highres
    if chosen.highres_fix_scale is None:
        return None
    upscaler = None
    if chosen.highres_fix_upscaler:
        upscaler = load_upscaler(chosen.highres_fix_upscaler, chosen.highres_fix_upscaler_args, model)
    return Highres(
        chosen.highres_fix_scale, chosen.highres_fix_steps, chosen.highres_fix_strength, chosen.highres_fix_save_1st,
        chosen.highres_fix_latents_upscaling, upscaler,
    )  # fmt: skip


def _regions(options: GenerateOptions, networks: Networks) -> Regions | None:
    """With networks a mask shows where each of them acts."""
    chosen = options.network
    if not (options.source.mask_path and chosen.network_weights) or chosen.network_merge:
        return None
    mask = list_images(options.source.mask_path, "--mask_path")[0]
    return Regions.load(mask, networks, chosen.network_regional_mask_max_color_codes)
