"""From prompts to images. `generate` is the whole way.

An image depends on its `PromptSpec`, the model and the networks only: not on its neighbours in the batch, the device, or any
random state of the process; and no random state changes. The stages are in modules of their own: jobs (what goes together),
encoding, denoise, image_input (img2img, in-painting), highres, regional, deep_shrink; painter joins them for one batch.

Not built: ControlNet, CLIP and VGG16 guidance, Gradual Latent, and XTI embeddings.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image

from library.errors import RunFailed, UserError
from library.generation.encoding import PromptCache, short
from library.generation.highres import Highres, enlarge
from library.generation.image_input import composite, load_image, load_mask, resized, run_steps
from library.generation.jobs import Job, batches, make_job
from library.generation.networks import Networks
from library.generation.painter import Canvas, Painter
from library.generation.prompts import PromptSpec
from library.generation.regional import Regions
from library.models.modules import evaluating

if TYPE_CHECKING:
    from library.models.family import Model

log = logging.getLogger(__name__)

DRAWN_SEEDS = 2**31  # seeds drawn here are below this: short enough for a file name


class Made(NamedTuple):
    """An image with what it was made from, its seed included. `stage` is 0 for a first stage of highres, else 1."""

    spec: PromptSpec
    image: Image.Image
    stage: int = 1


def generate(
    model: Model,
    specs: Iterable[PromptSpec],
    *,
    batch_size: int = 1,
    vae_batch_size: int | float | None = None,
    clip_skip: int | None = None,
    max_token_length: int = 225,
    zero_terminal_snr: bool | None = None,
    networks: Networks | None = None,
    highres: Highres | None = None,
    regions: Regions | None = None,
    texts: PromptCache | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[float], object] | None = None,
    on_error: Callable[[PromptSpec, UserError], object] | None = None,
) -> Iterator[Made]:
    """Make the images in order, up to `batch_size` neighbours of equal size, steps, sampler and strengths at once.

    Yields each with the seed that was used; a spec without a seed gets one at random. With `highres.save_first_stage` the first
    stages of a batch come before its images.
    The models may stand in training mode and on different devices, and may hold networks. While a batch is made they are in
    evaluation mode; a network that is not a submodule of theirs is the caller's to switch, unless it is one of `networks`.

    vae_batch_size: images that the VAE decodes at once, below 1 a share of the batch; None: all of it.
    networks: set to each image's strengths. Without it `<lora:name:0.8>` in a prompt is ordinary text.
    texts: embeddings kept from call to call; it must have been used with this model and clip_skip alone.
    autocast: makes the context for text encoder and U-Net, such as `accelerator.autocast`; the VAE computes in its own dtype.
    progress: called after each denoising step with the images done since the last call, a fraction; for example the `update` of
    `tqdm(total=len(specs))`.
    on_error: called with an image that failed, and the rest goes on. Without it the first failure is raised.
    """
    painter = Painter(
        model, clip_skip=clip_skip, zero_terminal_snr=zero_terminal_snr, networks=networks, regions=regions, texts=texts,
        autocast=autocast, vae_batch_size=vae_batch_size,
    )  # fmt: skip

    def jobs() -> Iterator[Job | tuple[PromptSpec, UserError]]:
        for spec in specs:
            spec = spec if spec.seed is not None else replace(spec, seed=secrets.randbelow(DRAWN_SEEDS))
            try:
                yield make_job(model, spec, max_token_length, networks, regions, painter.texts)
            except UserError as error:
                yield spec, error

    for batch in batches(jobs(), batch_size):
        for result in _make(painter, batch, highres, progress, on_error is not None):
            if isinstance(result, Made):
                yield result
            elif on_error is None:
                raise result[1]
            else:
                on_error(*result)


# Not a generator itself: at each yield its caller would find gradients off and the models in evaluation mode.
@torch.no_grad()
def _make(
    painter: Painter, batch: list, highres: Highres | None, progress: Callable[[float], object] | None, catch_all: bool
) -> list[Made | tuple[PromptSpec, UserError]]:
    """The images of one batch. catch_all: also what no one foresaw is an error of its images and not the end of the run."""
    results = [item for item in batch if not isinstance(item, Job)]
    canvases = []
    for job in (item for item in batch if isinstance(item, Job)):
        try:
            canvases.append(_open(job))
        except UserError as error:
            results.append((job.spec, error))
    if not canvases:
        return results
    spec, model = canvases[0].job.spec, painter.model
    try:
        with evaluating(*model.parts.values()):
            results += _stages(painter, canvases, highres, progress)
    except UserError as error:
        results += [(canvas.job.spec, error) for canvas in canvases]
    except torch.cuda.OutOfMemoryError:
        size = f"{spec.width} x {spec.height}"
        error = UserError(f"not enough GPU memory for {len(canvases)} image(s) of {size}; make smaller or fewer at once")
        results += [(canvas.job.spec, error) for canvas in canvases]
    except Exception as error:
        if not catch_all:
            raise
        log.debug("unforeseen", exc_info=True)
        reason = RunFailed(f"prompt '{short(spec.prompt)}': {type(error).__name__}: {error}")
        results += [(canvas.job.spec, reason) for canvas in canvases]
    return sorted(results, key=lambda result: not isinstance(result, Made))  # what is done goes out before an error is raised


def _open(job: Job) -> Canvas:
    """A canvas in the full size, with the image to begin from."""
    spec, size = job.spec, (job.spec.width, job.spec.height)
    if spec.image is None:
        return Canvas(job)
    image = load_image(spec.image, size)
    return Canvas(job, image, source=image, mask=load_mask(spec.mask, size) if spec.mask is not None else None)


def _stages(
    painter: Painter, canvases: list[Canvas], highres: Highres | None, progress: Callable[[float], object] | None
) -> list[Made | tuple[PromptSpec, UserError]]:
    spec = canvases[0].job.spec
    size, own_steps, begins = (spec.width, spec.height), spec.steps, canvases[0].begins
    if highres is None:
        _stage(painter, canvases, size, own_steps, spec.strength, 0, progress, 1.0)
        return [_result(canvas) for canvas in canvases]

    # The first stage counts for as much of the progress as it has of the steps.
    strength = spec.strength if highres.strength is None else highres.strength
    first_steps = run_steps(highres.steps, strength) if begins else highres.steps
    share = first_steps / max(1, first_steps + run_steps(own_steps, spec.strength))
    small = highres.first_size(*size)
    for canvas in canvases:
        canvas.image = canvas.image and resized(canvas.image, small)
    decode = highres.save_first_stage or not highres.keeps_latents
    _stage(painter, canvases, small, highres.steps, strength, 0, progress, share, decode)
    results = [_result(canvas) for canvas in canvases if canvas.error]
    good = [canvas for canvas in canvases if not canvas.error]
    if highres.save_first_stage:
        results += [Made(canvas.job.spec, canvas.image, stage=0) for canvas in good]
    if good:
        _enlarge(painter, good, highres, size)
        _stage(painter, good, size, own_steps, spec.strength, 1, progress, 1 - share)
    return results + [_result(canvas) for canvas in good]


def _stage(
    painter: Painter, canvases: list[Canvas], size: tuple[int, int], steps: int, strength: float, seed_shift: int,
    progress: Callable[[float], object] | None, share: float, decode: bool = True,
) -> None:  # fmt: skip
    """Paint the canvases in `size`. `share`: how much of the whole way to an image this is."""
    count = run_steps(steps, strength) if canvases[0].begins else steps
    done = len(canvases) * share
    if count == 0:  # nothing is added to what it begins from
        if canvases[0].image is None:
            painter.finish(canvases, torch.stack([canvas.latents for canvas in canvases]))
        if progress:
            progress(done)
        return
    on_step = (lambda part: progress(done * part)) if progress else None
    latents = painter.paint(canvases, size, steps=steps, strength=strength, seed_shift=seed_shift, on_step=on_step)
    painter.finish(canvases, latents, decode=decode)


def _enlarge(painter: Painter, canvases: list[Canvas], highres: Highres, size: tuple[int, int]) -> None:
    """Make what the first stage painted the beginning of the second."""
    images = latents = None
    if highres.keeps_latents and canvases[0].latents is not None:
        latents = torch.stack([canvas.latents for canvas in canvases])
    else:
        images = [canvas.image for canvas in canvases]
    images, latents = enlarge(highres, painter.model, images, latents, size, painter.vae_batch(len(canvases)))
    for index, canvas in enumerate(canvases):
        canvas.image = images[index] if images is not None else None
        if canvas.mask is not None and canvas.image is not None:
            canvas.image = composite(canvas.image, canvas.source, canvas.mask)
        canvas.latents = latents[index] if latents is not None else None


def _result(canvas: Canvas) -> Made | tuple[PromptSpec, UserError]:
    return (canvas.job.spec, canvas.error) if canvas.error else Made(canvas.job.spec, canvas.image)
