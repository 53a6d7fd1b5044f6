"""What is the same for all images of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from library.generation.extras.highres import Highres
from library.generation.extras.networks import Networks
from library.generation.extras.regional import Regions


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of a `Pipeline`.

    batch_size: neighbours of equal size, steps, sampler and strengths that share a batch, at most.
    vae_batch_size: images that the VAE decodes at once, below 1 a share of the batch; None: all of it.
    max_token_length: of a prompt, in tokens; what is longer is cut, with a warning.
    zero_terminal_snr: None: as the model's files state.
    networks: set to each image's strengths. Without it `<lora:name:0.8>` in a prompt is ordinary text.
    autocast: makes the context for text encoder and U-Net, such as `accelerator.autocast`; the VAE computes in its own dtype.
    """

    batch_size: int = 1
    vae_batch_size: float | None = None
    clip_skip: int | None = None
    max_token_length: int = 225
    zero_terminal_snr: bool | None = None
    networks: Networks | None = None
    highres: Highres | None = None
    regions: Regions | None = None
    autocast: Callable[[], AbstractContextManager] = nullcontext

    def vae_batch(self, count: int) -> int:
        """How many of `count` images the VAE gets at once."""
        wanted = count if self.vae_batch_size is None else self.vae_batch_size
        return max(1, int(wanted * count if wanted < 1 else wanted))


DEFAULTS = GenerateSettings()
