"""Diffusers' own pipelines around the suite's models, as the measure of what `generate` makes."""

from __future__ import annotations

import logging

import torch
from PIL import Image
from torch import Tensor

from library.generation.prompts.spec import PromptSpec

SMALL = {"unet_channels": (32, 32), "vae_channels": (32, 32, 32, 32)}


def make_pipeline(kind: str, model, scheduler):
    """`StableDiffusionPipeline`, or one of its relatives by the end of its name: `Img2Img`, `Inpaint`."""
    import diffusers

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    parts = (model.vae, model.text_encoders[0], model.tokenizers[0], model.denoiser, scheduler)
    pipeline_class = getattr(diffusers, f"StableDiffusion{kind}Pipeline")
    pipe = pipeline_class(*parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(pipe, spec: PromptSpec, **options) -> Tensor:
    """The latents (C, h, w) that a pipeline makes of a spec."""
    return pipe(
        prompt=spec.prompt, num_inference_steps=spec.steps, guidance_scale=spec.scale, negative_prompt=spec.negative_prompt,
        generator=torch.Generator("cpu").manual_seed(spec.seed), output_type="latent", **options,
    ).images[0]  # fmt: skip


def pipeline_latents(model, scheduler, spec: PromptSpec, **options) -> Tensor:
    """What Diffusers' own pipeline makes of the same models, scheduler and seed."""
    return run_pipeline(make_pipeline("", model, scheduler), spec, height=spec.height, width=spec.width, **options)


def an_image(size: tuple[int, int] = (64, 64), seed: int = 0) -> Image.Image:
    """A smooth coloured image."""
    noise = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((noise * 255).to(torch.uint8).numpy()).resize(size, Image.Resampling.BICUBIC)
