"""From prompts to pictures: text, noise, the denoising loop with guidance, decoding.

`generate` is the whole way; the functions below it are its stages, each usable alone. A picture depends on its `PromptSpec` and
the model only: not on its neighbours in the batch, the device, or any random state of the process; and no random state changes.
"""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from library.errors import UserError
from library.generation.prompts import MOST_STEPS, PromptSpec
from library.generation.samplers import make_scheduler
from library.sd.model import decode_latents, predict_noise
from library.sd.text import CHUNK, count_chunks, encode_text, tokenize_prompts

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin

    from library.sd.model import StableDiffusion

log = logging.getLogger(__name__)

DRAWN_SEEDS = 2**31  # seeds drawn here are below this: short enough for a file name


def generate(
    model: StableDiffusion,
    specs: Iterable[PromptSpec],
    *,
    batch_size: int = 1,
    clip_skip: int | None = None,
    max_token_length: int = 225,
    zero_terminal_snr: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[float], object] | None = None,
    on_error: Callable[[PromptSpec, UserError], object] | None = None,
) -> Iterator[tuple[PromptSpec, Image.Image]]:
    """Make the pictures in order, up to `batch_size` neighbours of equal size, steps and sampler at once.

    Yields each spec, with the seed that was used, and its picture. A spec without a seed gets one at random.
    The models may stand in training mode and on different devices, and may hold networks. While a batch is made they are in
    evaluation mode; a network that is not a submodule of theirs is the caller's to switch.

    autocast: makes the context for text encoder and U-Net, such as `accelerator.autocast`; the VAE computes in its own dtype.
    progress: called after each denoising step with the pictures done since the last call, a fraction; for example the `update` of
    `tqdm(total=len(specs))`.
    on_error: called with a picture that failed, and the rest goes on. Without it the first failure is raised as `UserError`.
    """
    # Made once a sampler, as some take a second to make; `set_timesteps` resets them for each batch.
    scheduler_of = cache(
        partial(make_scheduler, v_parameterization=model.v_parameterization, zero_terminal_snr=zero_terminal_snr)
    )
    specs = [spec if spec.seed is not None else replace(spec, seed=secrets.randbelow(DRAWN_SEEDS)) for spec in specs]
    for batch, chunks in _batches(model, specs, batch_size, max_token_length):
        try:
            results = _make_batch(model, batch, chunks, clip_skip, scheduler_of, autocast, progress)
        except UserError as error:
            results = [error] * len(batch)
        except torch.cuda.OutOfMemoryError:
            size = f"{batch[0].width} x {batch[0].height}"
            error = UserError(f"not enough GPU memory for {len(batch)} picture(s) of {size}; make smaller or fewer at once")
            results = [error] * len(batch)
        for spec, result in zip(batch, results):
            if isinstance(result, Image.Image):
                yield spec, result
            elif on_error is None:
                raise result
            else:
                on_error(spec, result)


# Not a generator itself: at each yield its caller would find gradients off and the models in evaluation mode.
@torch.no_grad()
def _make_batch(
    model: StableDiffusion,
    batch: list[PromptSpec],
    chunks: int,
    clip_skip: int | None,
    scheduler_of: Callable[[str], SchedulerMixin],
    autocast: Callable[[], AbstractContextManager],
    progress: Callable[[float], object] | None,
) -> list[Image.Image | UserError]:
    first = batch[0]
    channels, downscale = model.vae.config.latent_channels, 2 ** (len(model.vae.config.block_out_channels) - 1)
    _check(first, downscale)
    scheduler = scheduler_of(first.sampler)
    device = _device_of(model.unet)
    scheduler.set_timesteps(first.steps, device=device)
    generators = [Generator("cpu").manual_seed(spec.seed) for spec in batch]
    noise = start_noise(generators, channels, first.height // downscale, first.width // downscale)
    share = len(batch) / len(scheduler.timesteps)
    with evaluating(model.text_encoder, model.unet, model.vae):
        with autocast():
            context, negative = encode_prompts(model, batch, chunks, clip_skip)
            latents = denoise(
                model.unet, scheduler, noise.to(device) * scheduler.init_noise_sigma, context.to(device),
                negative=None if negative is None else negative.to(device), scales=[spec.scale for spec in batch],
                generators=generators, on_step=(lambda: progress(share)) if progress else None,
            )  # fmt: skip
        return [_finish(model.vae, spec, latent) for spec, latent in zip(batch, latents)]


def encode_prompts(
    model: StableDiffusion, batch: list[PromptSpec], chunks: int, clip_skip: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Embeddings (B, chunks * 75 + 2, width) of the prompts, and of the negative prompts (None where guidance is off)."""
    texts = [spec.prompt for spec in batch]
    guided = _is_guided(batch[0])
    if guided:
        texts = [spec.negative_prompt for spec in batch] + texts
    ids, weights = tokenize_prompts(model.tokenizer, texts, chunks)
    device = _device_of(model.text_encoder)
    weighted = bool((weights != 1).any())
    embeddings = encode_text(model.text_encoder, ids.to(device), clip_skip, weights.to(device) if weighted else None)
    if not guided:
        return embeddings, None
    negative, positive = embeddings.chunk(2)
    return positive, negative


def start_noise(generators: list[Generator], channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise (B, channels, height, width), float32 on the CPU, so that every device starts from the same."""
    return torch.cat([torch.randn((1, channels, height, width), generator=generator) for generator in generators])


def denoise(
    unet: nn.Module,
    scheduler: SchedulerMixin,
    latents: Tensor,
    context: Tensor,
    *,
    negative: Tensor | None,
    scales: list[float],
    generators: list[Generator],
    timesteps: Tensor | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Follow the scheduler from `latents` (B, C, h, w), which have the noise of its first timestep, to clean ones, float32.

    Guidance, where `negative` is given: e = e_neg + scale (e_pos - e_neg), with one scale a picture.
    generators: one a picture; the sampler's own noise is drawn from them. timesteps: a part of the scheduler's, to begin later.
    """
    latents = latents.float()
    scale = torch.tensor(scales, device=latents.device).view(-1, 1, 1, 1)
    both = context if negative is None else torch.cat([negative, context])
    dtype = next(unet.parameters()).dtype
    draws = "generator" in inspect.signature(scheduler.step).parameters
    step_options = {"generator": generators} if draws else {}
    for timestep in scheduler.timesteps if timesteps is None else timesteps:
        noisy = latents if negative is None else torch.cat([latents, latents])
        noisy = scheduler.scale_model_input(noisy, timestep)
        predicted = predict_noise(unet, noisy.to(dtype), timestep, both.to(dtype)).float()
        if negative is not None:
            unguided, wanted = predicted.chunk(2)
            predicted = unguided + scale * (wanted - unguided)
        latents = scheduler.step(predicted, timestep, latents, **step_options, return_dict=False)[0]
        if on_step is not None:
            on_step()
    return latents


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 to a picture; values outside are clipped."""
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put the models into evaluation mode; afterwards every submodule has the mode that it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _finish(vae: AutoencoderKL, spec: PromptSpec, latent: Tensor) -> Image.Image | UserError:
    """Decode one latent (C, h, w), alone so that memory does not grow with the batch."""
    name = f"prompt '{_short(spec.prompt)}' (seed {spec.seed})"
    if not latent.isfinite().all():
        return UserError(
            f"{name} gave NaN or infinite latents: the U-Net overflows or holds broken weights; "
            "use bf16 or full precision instead of fp16, or check the model and the network's weights and strength"
        )
    weight = next(vae.parameters())
    pixels = decode_latents(vae, latent.unsqueeze(0).to(weight.device, weight.dtype))[0]
    if not pixels.isfinite().all():
        return UserError(
            f"{name} gave a black picture: the VAE overflows in {weight.dtype}; keep it in float32 or give another --vae"
        )
    return to_picture(pixels)


def _batches(
    model: StableDiffusion, specs: list[PromptSpec], batch_size: int, max_token_length: int
) -> Iterator[tuple[list[PromptSpec], int]]:
    """Neighbours that can be made together, and the chunks of text that each of them needs.

    Pictures that need different numbers of chunks never go together: padding one to the length of another would change it.
    """

    def key(spec: PromptSpec) -> tuple:
        chunks = _chunks_needed(model, spec, max_token_length)
        return chunks, spec.width, spec.height, spec.steps, spec.sampler, _is_guided(spec)

    for (chunks, *_), group in groupby(specs, key):
        together = list(group)
        for start in range(0, len(together), batch_size):
            yield together[start : start + batch_size], chunks


def _chunks_needed(model: StableDiffusion, spec: PromptSpec, max_token_length: int) -> int:
    """How many chunks of 75 tokens hold both prompts of this picture; says what is cut."""
    texts = [spec.prompt, spec.negative_prompt] if _is_guided(spec) else [spec.prompt]
    most = max(1, max_token_length // CHUNK)
    needed = [count_chunks(model.tokenizer, text) for text in texts]
    for text, chunks in zip(texts, needed):
        if chunks > most:
            log.warning(f"prompt '{_short(text)}' needs more than {most * CHUNK} tokens; the rest is cut")
    return min(max(needed), most)


def _is_guided(spec: PromptSpec) -> bool:
    return spec.scale > 1


def _check(spec: PromptSpec, step: int) -> None:
    if spec.width % step or spec.height % step or min(spec.width, spec.height) < step:
        size = f"{spec.width} x {spec.height}"
        raise UserError(f"prompt '{_short(spec.prompt)}': size {size} is not possible; use multiples of {step}")
    if not 1 <= spec.steps <= MOST_STEPS:
        raise UserError(f"prompt '{_short(spec.prompt)}': {spec.steps} steps are not possible; use 1 to {MOST_STEPS}")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
