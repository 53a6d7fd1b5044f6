"""One batch through the models: text, latents, pixels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Generator, Tensor

from library.diffusion.samplers import make_scheduler
from library.errors import UserError
from library.generation.deep_shrink import shrinking
from library.generation.denoise import Guidance, denoise, start_noise
from library.generation.encoding import PromptCache, device_of, short
from library.generation.image_input import composite, encode_images, keep_outside, latent_masks, run_steps
from library.generation.jobs import Job
from library.generation.networks import Networks
from library.generation.prompts import LARGEST_SEED, PromptSpec
from library.generation.regional import Regions
from library.models.family import Conditioning

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from library.models.family import Model


@dataclass
class Canvas:
    """One image on its way: what a stage begins from, and afterwards what it made.

    image, RGB, or latents (C, h, w) in place of it: both None where the stage begins from noise alone. error: why it failed.
    source and mask (grey, mode L): for in-painting, in full size.
    """

    job: Job
    image: Image.Image | None = None
    latents: Tensor | None = None
    source: Image.Image | None = None
    mask: Image.Image | None = None
    error: UserError | None = None

    @property
    def begins(self) -> bool:
        return self.image is not None or self.latents is not None


class Painter:
    """The models with everything that stays the same from batch to batch."""

    def __init__(
        self, model: Model, *, clip_skip: int | None, zero_terminal_snr: bool | None, networks: Networks | None,
        regions: Regions | None, texts: PromptCache | None, autocast: Callable[[], AbstractContextManager],
        vae_batch_size: int | float | None,
    ) -> None:  # fmt: skip
        self.model, self.clip_skip, self.networks, self.regions = model, clip_skip, networks, regions
        self.texts = texts or PromptCache()
        self.autocast, self.vae_batch_size = autocast, vae_batch_size
        # Made once a sampler, as some take a second to make; `set_timesteps` resets them for each batch.
        self.scheduler_of: Callable[[str], SchedulerMixin] = cache(
            partial(make_scheduler, process=model.process(zero_terminal_snr))
        )
        self.latents = model.latents

    def vae_batch(self, count: int) -> int:
        """How many of `count` images the VAE gets at once."""
        wanted = count if self.vae_batch_size is None else self.vae_batch_size
        return max(1, int(wanted * count if wanted < 1 else wanted))

    # ---- text

    def guidance(self, jobs: list[Job], size: tuple[int, int]) -> Guidance:
        """The denoiser with the texts of the batch; afterwards the networks have the strengths that the denoiser is to have."""
        first, networks, multipliers = jobs[0], self.networks, jobs[0].multipliers

        def encode(texts: list[str], strengths: tuple[float, ...]) -> Conditioning:
            if networks is not None:
                networks.set(strengths, first.loras)
            state = networks.state if networks is not None else ()
            return self.texts.encode(self.model, texts, first.chunks, self.clip_skip, state).to(device_of(self.model.denoiser))

        def only(index: int | None) -> tuple[float, ...]:
            """With regions, a network acts on its own sub-prompt alone."""
            if self.regions is None:
                return multipliers
            return tuple(strength if place == index else 0.0 for place, strength in enumerate(multipliers))

        negative = empty = None
        if first.is_guided:
            negative = encode([job.spec.negative_prompt for job in jobs], only(None))
            empty = None if first.spec.negative_scale is None else encode([""] * len(jobs), only(None))
        parts = [encode([job.prompts[part] for job in jobs], only(part)) for part in range(len(first.prompts))]
        if networks is not None:
            networks.set(multipliers, first.loras)
        positive = parts[0] if len(parts) == 1 else parts[0].attending([part["context"] for part in parts])
        width, height = size
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(jobs), device=device_of(self.model.denoiser))
        scales = [job.spec.scale for job in jobs]
        negative_scales = scales if empty is None else [job.spec.negative_scale or 0.0 for job in jobs]
        return Guidance(self.model, sizes, positive, negative, empty, scales, negative_scales)

    # ---- latents

    def paint(
        self, canvases: list[Canvas], size: tuple[int, int], *, steps: int, strength: float, seed_shift: int = 0,
        on_step: Callable[[float], object] | None = None,
    ) -> Tensor:  # fmt: skip
        """Latents (B, C, h, w), float32, of images of `size` (width, height): from noise, or from what the canvases begin with.

        on_step: called after each step with its share of all.
        """
        spec, device = canvases[0].job.spec, device_of(self.model.denoiser)
        seeds = [(canvas.job.spec.seed + seed_shift) % (LARGEST_SEED + 1) for canvas in canvases]
        generators = [Generator("cpu").manual_seed(seed) for seed in seeds]
        scheduler = self.scheduler_of(spec.sampler)
        scheduler.set_timesteps(steps, device=device)
        clean = self._clean_latents(canvases, generators, device)
        noise = start_noise(generators, self.latents.channels, *self.latents.size(*size)).to(device)
        timesteps, after_step = scheduler.timesteps, None
        if clean is not None:
            skipped = (steps - run_steps(steps, strength)) * scheduler.order
            timesteps = timesteps[skipped:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(skipped)
        if clean is None or (canvases[0].mask is not None and strength == 1):
            latents = noise * scheduler.init_noise_sigma
        else:
            latents = scheduler.add_noise(clean, noise, timesteps[:1].repeat(len(clean)))
        if canvases[0].mask is not None:
            masks = latent_masks([canvas.mask for canvas in canvases], *noise.shape[2:]).to(device)
            after_step = keep_outside(scheduler, clean, noise, masks)
        with self.autocast():
            guidance = self.guidance([canvas.job for canvas in canvases], size)
            with self._special_unet(spec, guidance, noise):
                return denoise(
                    guidance, scheduler, latents, generators=generators, timesteps=timesteps, after_step=after_step,
                    on_step=partial(on_step, 1 / len(timesteps)) if on_step else None,
                )  # fmt: skip

    def _clean_latents(self, canvases: list[Canvas], generators: list[Generator], device: torch.device) -> Tensor | None:
        if not canvases[0].begins:
            return None
        if canvases[0].latents is not None:
            return torch.stack([canvas.latents for canvas in canvases]).to(device)
        images = [canvas.image for canvas in canvases]
        return encode_images(self.model, images, generators, self.vae_batch(len(images))).to(device)

    def _special_unet(self, spec: PromptSpec, guidance: Guidance, noise: Tensor) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(shrinking(self.model.denoiser, spec.deep_shrink))
        if self.regions is not None:
            batch, plain = len(noise), guidance.predictions - 1
            parts = len(guidance.positive["context"]) // batch
            stack.enter_context(self.regions.acting(self.model.denoiser, batch, parts, plain, *noise.shape[2:]))
        return stack

    # ---- pixels

    def finish(self, canvases: list[Canvas], latents: Tensor, *, decode: bool = True) -> None:
        """Give every canvas its latents and image, or the error for latents and pixels that are not finite."""
        for canvas, latent in zip(canvases, latents, strict=True):
            canvas.image, canvas.latents = None, latent
            if not latent.isfinite().all():
                canvas.error = UserError(
                    f"{_name(canvas)} gave NaN or infinite latents: the U-Net overflows or holds broken weights; "
                    "use bf16 or full precision instead of fp16, or check the model and the network's weights and strength"
                )
        good = [canvas for canvas in canvases if canvas.error is None]
        at_once = self.vae_batch(len(canvases))
        for start in range(0, len(good) if decode else 0, at_once):
            together = good[start : start + at_once]
            try:
                self._decode(together)
            except torch.cuda.OutOfMemoryError:
                if len(together) == 1:
                    raise
                for canvas in together:  # the denoising was the long part; one by one takes less memory
                    self._decode([canvas])

    def _decode(self, canvases: list[Canvas]) -> None:
        weight = next(self.model.vae.parameters())
        latents = torch.stack([canvas.latents for canvas in canvases])
        for canvas, pixels in zip(canvases, self.model.decode(latents), strict=True):
            if pixels.isfinite().all():
                image = to_image(pixels)
                canvas.image = image if canvas.mask is None else composite(image, canvas.source, canvas.mask)
            else:
                reason = f"overflows in {weight.dtype}; keep it in float32 (--no_half_vae) or give another --vae"
                if weight.dtype == torch.float32:
                    reason = "overflows or holds broken weights; give another --vae, or check the model"
                canvas.error = UserError(f"{_name(canvas)} gave a black image: the VAE {reason}")


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 to an image; values outside are clipped."""
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def _name(canvas: Canvas) -> str:
    return f"prompt '{short(canvas.job.spec.prompt)}' (seed {canvas.job.spec.seed})"
