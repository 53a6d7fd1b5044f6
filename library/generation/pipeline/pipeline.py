"""From prompts to images. `Pipeline.generate` runs all stages.

An image depends on its `PromptSpec`, the model and the networks only: not on its neighbours in the batch, the device, or any
random state of the process; and no random state changes. image_state: what an image needs, and which share a batch; latents: one
stage, from text to latents; pixels: from latents to images. Optional features are in library/generation/extras.

Not built: ControlNet, CLIP and VGG16 guidance, Gradual Latent, and XTI embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image

from library.errors import RunFailed, UserError, counted
from library.generation.extras.highres import Highres, enlarge
from library.generation.extras.image_input import composite, load_image, load_mask, resized, run_steps
from library.generation.pipeline.encoding import short
from library.generation.pipeline.image_state import ImageState, batches, prepare
from library.generation.pipeline.latents import LatentSampler, Stage
from library.generation.pipeline.pixels import decode_images, note_broken
from library.generation.pipeline.settings import DEFAULTS, GenerateSettings
from library.generation.prompts.spec import PromptSpec
from library.models.modules import evaluating

if TYPE_CHECKING:
    from library.models.family import Model

log = logging.getLogger(__name__)

Progress = Callable[[float], object]


@dataclass(frozen=True)
class GeneratedImage:
    """An image with its spec, size and seed included, and the index of that spec.

    stage: 0 for a first stage of highres, else 1.
    """

    index: int
    spec: PromptSpec
    image: Image.Image
    stage: int = 1

    @property
    def full_size(self) -> tuple[int, int]:
        """Width and height of the final image."""
        return self.spec.width or 0, self.spec.height or 0


@dataclass(frozen=True)
class Failed:
    """A spec whose image failed, its index and the error."""

    index: int
    spec: PromptSpec
    error: UserError


class Pipeline:
    """A model with everything that stays the same from image to image. Encoded texts are cached, so weights must not change.

    The parts of the model may be in training mode and on different devices, and may hold networks. While a batch is drawn they
    are in evaluation mode; a network that is not a submodule of theirs is the caller's to switch, unless the settings name it.
    """

    def __init__(self, model: Model, settings: GenerateSettings = DEFAULTS) -> None:
        self.model, self.settings = model, settings
        self._latents = LatentSampler(model, settings)

    def generate(
        self,
        specs: Iterable[PromptSpec],
        *,
        progress: Progress = lambda done: None,
        on_error: Callable[[Failed], object] | None = None,
    ) -> Iterator[GeneratedImage]:
        """Yield the images in order. Neighbours that can share a batch are computed together.

        With `highres.save_first_stage` the first stages of a batch come before its images.
        progress: called after each denoising step with the images done since the last call, a fraction; for example the `update`
        of `tqdm(total=len(specs))`.
        on_error: called with an image that failed, and the rest goes on. Without it the first failure is raised.
        """
        texts = self._latents.texts
        states = (prepare(index, spec, self.model, self.settings, texts) for index, spec in enumerate(specs))
        for batch in batches(states, self.settings.batch_size):
            yield from self._draw(batch, progress, catch_all=on_error is not None)
            for state in batch:
                if state.error is not None and on_error is None:
                    raise state.error
                if state.error is not None and on_error is not None:
                    on_error(Failed(state.index, state.spec, state.error))

    # Not a generator itself: at each yield its caller would find gradients off and the models in evaluation mode.
    @torch.no_grad()
    def _draw(self, batch: list[ImageState], progress: Progress, catch_all: bool) -> list[GeneratedImage]:
        """The images of a batch; states that failed get their error. catch_all: errors of any class, not UserErrors alone."""
        for state in batch:
            _load_source(state)
        states = [state for state in batch if state.error is None]
        if not states:
            return []
        try:
            with evaluating(*self.model.parts.values()):
                return self._stages(states, progress)
        except UserError as error:
            failure = error
        except torch.cuda.OutOfMemoryError:
            size = "{} x {}".format(*states[0].size)
            failure = UserError(
                f"not enough GPU memory for {counted(len(states), 'image')} of {size}; make smaller or fewer at once"
            )
        except Exception as error:
            if not catch_all:
                raise
            log.debug("an image failed", exc_info=True)
            failure = RunFailed(f"prompt '{short(states[0].spec.prompt)}': {type(error).__name__}: {error}")
        for state in states:
            state.error = failure
        return []

    def _stages(self, states: list[ImageState], progress: Progress) -> list[GeneratedImage]:
        spec, highres = states[0].spec, self.settings.highres
        only = Stage(states[0].size, spec.steps, spec.strength)
        if highres is None:
            self._run(only, states, progress)
            return _finished(states)

        # The first stage counts for as much of the progress as it has of the steps.
        strength = spec.strength if highres.strength is None else highres.strength
        first_steps = run_steps(highres.steps, strength) if states[0].has_start else highres.steps
        share = first_steps / max(1, first_steps + run_steps(spec.steps, spec.strength))
        first = Stage(
            highres.first_size(*only.size), highres.steps, strength, share=share,
            decode=highres.save_first_stage or not highres.keeps_latents,
        )  # fmt: skip
        for state in states:
            state.image = state.image and resized(state.image, first.size)
        self._run(first, states, progress)
        images = _finished(states, stage=0) if highres.save_first_stage else []
        good = [state for state in states if state.error is None]
        if good:
            self._enlarge(good, highres)
            self._run(replace(only, seed_shift=1, share=1 - share), good, progress)
        return images + _finished(good)

    def _run(self, stage: Stage, states: list[ImageState], progress: Progress) -> None:
        """Bring the images through a stage."""
        steps = run_steps(stage.steps, stage.strength) if states[0].has_start else stage.steps
        done = len(states) * stage.share
        if steps:
            latents = self._latents.sample(stage, states, lambda part: progress(done * part))
            for state, own in zip(states, latents, strict=True):
                state.image, state.latents = None, own
        note_broken(states)
        if stage.decode and states[0].image is None:
            decode_images([state for state in states if state.error is None], self.model, self.settings.vae_batch(len(states)))
        if not steps:  # the image stays as it is
            progress(done)

    def _enlarge(self, states: list[ImageState], highres: Highres) -> None:
        """Enlarge what the first stage gave: the second starts from it."""
        images = latents = None
        if highres.keeps_latents and states[0].latents is not None:
            latents = torch.stack([state.latents for state in states if state.latents is not None])
        else:
            images = [state.image for state in states if state.image is not None]
        at_once = self.settings.vae_batch(len(states))
        images, latents = enlarge(highres, self.model, images, latents, states[0].size, at_once)
        for index, state in enumerate(states):
            state.image = images[index] if images is not None else None
            if state.mask is not None and state.source is not None and state.image is not None:
                state.image = composite(state.image, state.source, state.mask)
            state.latents = latents[index] if latents is not None else None


def _load_source(state: ImageState) -> None:
    """Read the image to start from and its mask, in the full size."""
    spec = state.spec
    if spec.image is None or state.error is not None:
        return
    try:
        state.image = state.source = load_image(spec.image, state.size)
        state.mask = load_mask(spec.mask, state.size) if spec.mask is not None else None
    except UserError as error:
        state.error = error


def _finished(states: list[ImageState], stage: int = 1) -> list[GeneratedImage]:
    return [
        GeneratedImage(state.index, state.spec, state.image, stage)
        for state in states
        if state.error is None and state.image is not None
    ]
