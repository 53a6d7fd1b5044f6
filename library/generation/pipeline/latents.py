"""One stage of a batch, from text to latents."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from library.diffusion.samplers import make_scheduler
from library.generation.extras.deep_shrink import shrinking
from library.generation.extras.image_input import encode_images, keep_outside, latent_masks, run_steps
from library.generation.pipeline.denoise import Guidance, denoise, start_noise
from library.generation.pipeline.encoding import PromptCache, device_of
from library.generation.pipeline.image_state import ImageState
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.spec import LARGEST_SEED
from library.models.family import Conditioning

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from library.models.family import Model


@dataclass(frozen=True)
class Stage:
    """How a batch is denoised once. With highres there are two of them.

    size: (width, height). seed_shift: added to the seed of each image. share: how much of the whole way to an image it is.
    decode: whether its latents become images.
    """

    size: tuple[int, int]
    steps: int
    strength: float
    seed_shift: int = 0
    share: float = 1.0
    decode: bool = True


class LatentSampler:
    """Text encoders and denoiser, with a cache of encoded texts and of schedulers."""

    def __init__(self, model: Model, settings: GenerateSettings) -> None:
        self.model, self.settings = model, settings
        self.texts = PromptCache()
        # One for each sampler, as creating some takes a second; `set_timesteps` resets them for each batch.
        self._scheduler_of: Callable[[str], SchedulerMixin] = cache(
            partial(make_scheduler, process=model.process(settings.zero_terminal_snr))
        )

    def sample(self, stage: Stage, states: list[ImageState], on_step: Callable[[float], object]) -> Tensor:
        """Latents (B, C, h, w), float32: from noise, or from what the images start from.

        on_step: called after each step with its share of all.
        """
        first, device, space = states[0], device_of(self.model.denoiser), self.model.latents
        seeds = [(state.seed + stage.seed_shift) % (LARGEST_SEED + 1) for state in states]
        generators = [Generator("cpu").manual_seed(seed) for seed in seeds]
        scheduler: Any = self._scheduler_of(first.spec.sampler)
        scheduler.set_timesteps(stage.steps, device=device)
        clean = self._clean_latents(states, generators, device)
        noise = start_noise(generators, space.channels, *space.size(*stage.size)).to(device)
        timesteps, after_step = scheduler.timesteps, None
        if clean is not None:
            skipped = (stage.steps - run_steps(stage.steps, stage.strength)) * scheduler.order
            timesteps = timesteps[skipped:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(skipped)
        if clean is None or (first.mask is not None and stage.strength == 1):
            latents = noise * scheduler.init_noise_sigma
        else:
            latents = scheduler.add_noise(clean, noise, timesteps[:1].repeat(len(clean)))
        if clean is not None and first.mask is not None:
            masks = latent_masks([state.mask for state in states if state.mask is not None], *noise.shape[2:]).to(device)
            after_step = keep_outside(scheduler, clean, noise, masks)
        with self.settings.autocast():
            guidance = self.guidance(states, stage.size)
            with self._extras_on_unet(first, guidance, noise):
                return denoise(
                    guidance, scheduler, latents, generators=generators, timesteps=timesteps, after_step=after_step,
                    on_step=partial(on_step, 1 / len(timesteps)),
                )  # fmt: skip

    def _clean_latents(self, states: list[ImageState], generators: list[Generator], device: torch.device) -> Tensor | None:
        if not states[0].has_start:
            return None
        if states[0].latents is not None:
            return torch.stack([state.latents for state in states if state.latents is not None]).to(device)
        images = [state.image for state in states if state.image is not None]
        return encode_images(self.model, images, generators, self.settings.vae_batch(len(images))).to(device)

    def guidance(self, states: list[ImageState], size: tuple[int, int]) -> Guidance:
        """The denoiser with the texts of the batch; afterwards the networks have their strengths for the denoiser."""
        first, networks, device = states[0], self.settings.networks, device_of(self.model.denoiser)

        def encode(texts: list[str], strengths: tuple[float, ...]) -> Conditioning:
            if networks is not None:
                networks.set(strengths, first.loras)
            active = networks.state if networks is not None else ()
            return self.texts.encode(self.model, texts, first.chunks, self.settings.clip_skip, active).to(device)

        def only(index: int | None) -> tuple[float, ...]:
            """With regions, a network acts on its own sub-prompt alone."""
            if first.regions is None:
                return first.multipliers
            return tuple(strength if number == index else 0.0 for number, strength in enumerate(first.multipliers))

        negative = empty = None
        if first.is_guided:
            negative = encode([state.spec.negative_prompt for state in states], only(None))
            empty = None if first.spec.negative_scale is None else encode([""] * len(states), only(None))
        parts = [encode([state.prompts[part] for state in states], only(part)) for part in range(len(first.prompts))]
        if networks is not None:
            networks.set(first.multipliers, first.loras)
        positive = parts[0] if len(parts) == 1 else parts[0].with_contexts([part["context"] for part in parts])
        conditions = [state.spec.sizes.rows(*size) for state in states]
        sizes, negative_sizes = (torch.tensor(rows, device=device) for rows in zip(*conditions, strict=True))
        scales = [state.spec.scale for state in states]
        negative_scales = scales if empty is None else [state.spec.negative_scale or 0.0 for state in states]
        return Guidance(self.model, sizes, negative_sizes, positive, negative, empty, scales, negative_scales)

    def _extras_on_unet(self, first: ImageState, guidance: Guidance, noise: Tensor) -> AbstractContextManager[Any]:
        """Within: Deep Shrink and regions act on the U-Net, where the images have them."""
        stack = ExitStack()
        stack.enter_context(shrinking(self.model.denoiser, first.spec.deep_shrink))
        if first.regions is not None:
            batch, plain = len(noise), guidance.predictions - 1
            parts = len(guidance.positive["context"]) // batch
            stack.enter_context(first.regions.acting(self.model.denoiser, batch, parts, plain, *noise.shape[2:]))
        return stack
