"""The state of one image in the pipeline, checked before anything is computed, and which images can share a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from library.diffusion.process import NoiseProcess
from library.diffusion.samplers import check_sampler
from library.errors import UserError
from library.generation.extras.deep_shrink import check_deep_shrink
from library.generation.pipeline.encoding import PromptCache, short
from library.generation.pipeline.settings import GenerateSettings
from library.generation.pipeline.sizes import size_of_spec
from library.generation.prompts.loras import split_loras
from library.generation.prompts.seeds import draw_seed
from library.generation.prompts.spec import MAX_STEPS, PromptSpec, SizeConditioning, check_negative_scale, split_regions

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from library.generation.extras.regional import Regions
    from library.models.family import Model


@dataclass
class ImageState:
    """What an image needs, and what a stage starts from or has computed.

    index: which of the specs it is. spec: with its size and seed. prompts: what the text encoder reads, one text, or with
    regions one for each sub-prompt; chunks: of 75 tokens. regions: None where the mask is of what is repainted.
    image, RGB, or latents (C, h, w) instead: both None where a stage starts from noise alone. source and mask (grey, mode
    L): for in-painting, in full size. error: why it failed.
    """

    index: int
    spec: PromptSpec
    size: tuple[int, int] = (0, 0)  # width and height
    seed: int = 0
    prompts: tuple[str, ...] = ()
    chunks: int = 1
    multipliers: tuple[float, ...] = ()
    loras: tuple[tuple[str, float], ...] = ()
    regions: Regions | None = None
    image: Image.Image | None = None
    latents: Tensor | None = None
    source: Image.Image | None = None
    mask: Image.Image | None = None
    error: UserError | None = None

    @property
    def is_guided(self) -> bool:
        return self.spec.scale > 1

    @property
    def has_start(self) -> bool:
        """Whether it starts from an image or latents, and not from noise alone."""
        return self.image is not None or self.latents is not None

    @property
    def key(self) -> tuple | None:
        """Images of one key can share a batch; None for one that failed.

        Those that need different numbers of chunks cannot: padding one to the length of another would change it.
        """
        if self.error is not None:
            return None
        spec = self.spec
        return (
            self.chunks, len(self.prompts), self.multipliers, self.loras, self.size, spec.steps, spec.sampler,
            self.is_guided, spec.negative_scale is None, spec.image is None, spec.mask is None, spec.strength, spec.deep_shrink,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"prompt '{short(self.spec.prompt)}' (seed {self.seed})"


def prepare(index: int, spec: PromptSpec, model: Model, settings: GenerateSettings, texts: PromptCache) -> ImageState:
    """The state of an image before its first stage; with its error if it cannot be drawn."""
    seed = draw_seed() if spec.seed is None else spec.seed
    state = ImageState(index, replace(spec, seed=seed), seed=seed)
    try:
        state.size = size_of_spec(model, spec)
        state.spec = replace(state.spec, width=state.size[0], height=state.size[1])
        _check_size(model, state)
        _check_numbers(model, spec)
        check_process(model.process(settings.zero_terminal_snr))
        _resolve_prompt(state, model, settings, texts)
    except UserError as error:
        state.error = error
    return state


def _resolve_prompt(state: ImageState, model: Model, settings: GenerateSettings, texts: PromptCache) -> None:
    spec, prompt = state.spec, state.spec.prompt
    if settings.networks is not None:
        state.multipliers = settings.networks.multipliers(spec)
        prompt, state.loras = split_loras(spec.prompt)
        for name, _ in state.loras:
            settings.networks.find(name)
        if split_loras(spec.negative_prompt)[1]:
            raise UserError(f"negative prompt '{short(spec.negative_prompt)}': <lora:...> belongs into the prompt; move it there")
    prompts = [prompt]
    state.regions = settings.regions if spec.mask is None else None
    if state.regions is not None:
        prompts = split_regions(prompt)
        state.regions.check(prompts)
        if spec.deep_shrink is not None:
            raise UserError("Deep Shrink and regional prompts cannot be combined: masks do not fit the shrunk layers")
    state.prompts = tuple(prompts)
    read = [*prompts, spec.negative_prompt] if state.is_guided else prompts
    state.chunks = texts.chunks_needed(model, read, settings.max_token_length)


def _check_size(model: Model, state: ImageState) -> None:
    step, (width, height) = model.latents.pixels_per_latent, state.size
    if width % step or height % step or min(width, height) < step:
        size = f"{width} x {height}"
        raise UserError(f"prompt '{short(state.spec.prompt)}': size {size} is not possible; use multiples of {step}")


def _check_numbers(model: Model, spec: PromptSpec) -> None:
    where = f"prompt '{short(spec.prompt)}'"
    check_sampler(spec.sampler, where)
    if not 1 <= spec.steps <= MAX_STEPS:
        raise UserError(f"{where}: {spec.steps} steps are not possible; use 1 to {MAX_STEPS}")
    if not 0 <= spec.strength <= 1:
        raise UserError(f"{where}: strength {spec.strength} is not possible; use 0 to 1")
    check_negative_scale(spec.scale, spec.negative_scale)
    if spec.mask is not None and spec.image is None:
        raise UserError(f"{where}: a mask needs an image to begin from; give --image_path too")
    if spec.sizes != SizeConditioning() and getattr(model.denoiser.config, "addition_embed_type", None) is None:
        given = ", ".join(f"--{name}" for name, value in vars(spec.sizes).items() if value)
        raise UserError(f"{where}: {given}: {model.family.title} models take no size conditioning; leave it out")
    if spec.deep_shrink is not None:
        check_deep_shrink(spec.deep_shrink, len(model.denoiser.config.block_out_channels))


def check_process(process: NoiseProcess) -> None:
    """UserError if the schedule begins with pure noise and the model predicts noise: then it predicts nothing of the image."""
    if process.zero_terminal_snr and not process.predicts_velocity:
        cure = "add --v_parameterization if the model predicts velocity, else leave --zero_terminal_snr out"
        raise UserError(f"--zero_terminal_snr needs a model that predicts velocity, and this one predicts noise; {cure}")


def batches(states: Iterable[ImageState], size: int) -> Iterator[list[ImageState]]:
    """Neighbours of one key, up to `size` of them. Looks one image ahead."""
    for _, group in groupby(states, lambda state: state.key):
        together = list(group)
        for start in range(0, len(together), size):
            yield together[start : start + size]
