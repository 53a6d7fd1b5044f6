"""What one image needs, worked out and checked before anything is computed, and which images can be made together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from library.diffusion.samplers import check_sampler
from library.errors import UserError
from library.generation.deep_shrink import check_deep_shrink
from library.generation.encoding import PromptCache, short
from library.generation.networks import Networks
from library.generation.prompt_loras import split_loras
from library.generation.prompts import MOST_STEPS, PromptSpec, check_negative_scale, split_regions
from library.generation.regional import Regions

if TYPE_CHECKING:
    from library.models.family import Model


@dataclass(frozen=True)
class Job:
    """An image to make. `prompts` are what the text encoder reads: one text, or with regions one for each sub-prompt."""

    spec: PromptSpec
    prompts: tuple[str, ...]
    chunks: int  # of 75 tokens
    multipliers: tuple[float, ...] = ()
    loras: tuple[tuple[str, float], ...] = ()

    @property
    def is_guided(self) -> bool:
        return self.spec.scale > 1

    @property
    def key(self) -> tuple:
        """Images of one key can be made together.

        Those that need different numbers of chunks cannot: padding one to the length of another would change it.
        """
        spec = self.spec
        return (
            self.chunks, len(self.prompts), self.multipliers, self.loras, spec.width, spec.height, spec.steps, spec.sampler,
            self.is_guided, spec.negative_scale is None, spec.image is None, spec.mask is None, spec.strength, spec.deep_shrink,
        )  # fmt: skip


def batches(jobs: Iterable[Job | tuple[PromptSpec, UserError]], size: int) -> Iterator[list[Job | tuple[PromptSpec, UserError]]]:
    """Neighbours of one key, up to `size` of them; what is not a job is alone. Looks one image ahead."""
    for _, group in groupby(jobs, lambda job: job.key if isinstance(job, Job) else None):
        together = list(group)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def make_job(
    model: Model, spec: PromptSpec, max_token_length: int, networks: Networks | None, regions: Regions | None,
    encodings: PromptCache,
) -> Job:  # fmt: skip
    """The job for a spec. Raises UserError for one that cannot be made."""
    _check_size(model, spec)
    _check_numbers(model, spec)
    prompt = spec.prompt
    loras: tuple[tuple[str, float], ...] = ()
    multipliers: tuple[float, ...] = ()
    if networks is not None:
        multipliers = networks.multipliers(spec)
        prompt, loras = split_loras(spec.prompt)
        for name, _ in loras:
            networks.find(name)
        if split_loras(spec.negative_prompt)[1]:
            raise UserError(f"negative prompt '{short(spec.negative_prompt)}': <lora:...> belongs into the prompt; move it there")
    prompts = [prompt]
    if regions is not None:
        prompts = split_regions(prompt)
        regions.check(prompts)
        if spec.deep_shrink is not None:
            raise UserError("Deep Shrink and regional prompts cannot be combined: masks have no place in the shrunk layers")
    texts = [*prompts, spec.negative_prompt] if spec.scale > 1 else prompts
    return Job(spec, tuple(prompts), encodings.chunks_needed(model, texts, max_token_length), tuple(multipliers), loras)


def _check_size(model: Model, spec: PromptSpec) -> None:
    step = model.latents.pixels_per_latent
    if spec.width % step or spec.height % step or min(spec.width, spec.height) < step:
        size = f"{spec.width} x {spec.height}"
        raise UserError(f"prompt '{short(spec.prompt)}': size {size} is not possible; use multiples of {step}")


def _check_numbers(model: Model, spec: PromptSpec) -> None:
    where = f"prompt '{short(spec.prompt)}'"
    check_sampler(spec.sampler, where)
    if not 1 <= spec.steps <= MOST_STEPS:
        raise UserError(f"{where}: {spec.steps} steps are not possible; use 1 to {MOST_STEPS}")
    if not 0 <= spec.strength <= 1:
        raise UserError(f"{where}: strength {spec.strength} is not possible; use 0 to 1")
    check_negative_scale(spec.scale, spec.negative_scale)
    if spec.mask is not None and spec.image is None:
        raise UserError(f"{where}: a mask needs an image to begin from; give --image_path too")
    if spec.deep_shrink is not None:
        check_deep_shrink(spec.deep_shrink, len(model.denoiser.config.block_out_channels))
