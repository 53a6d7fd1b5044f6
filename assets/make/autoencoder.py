"""The VAE, trained from nothing on the images of all styles but fluenthc and fluentflat.

Errors of colour are counted in opponent colours, each in units of its deviation: in RGB, green against purple is the axis with
the least of the error, and a VAE stopped early draws frogs orange.

64 channels where the image has its full size: group norm has 32 groups, and groups of a single channel would take away each
channel's mean, and with it the colours (tried: after 11,000 images everything was still grey).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from assets.make.augment import augmented
from assets.make.images import Images
from assets.make.names import AUTOENCODER_STYLES, NAMES, STYLES
from assets.make.perceptual import Perceptual
from assets.make.training import Average, Checkpoint, clip_and_step, rate_at
from library.models.family import LatentSpace
from library.models.unet import LATENT_CHANNELS
from library.models.vae import vae_config

CHANNELS, LAYERS = (64, 32, 64, 128), 1
BATCH = 4
PEAK_RATE = 1.2e-3
EMA_DECAY = 0.997
KL_WEIGHT = 1e-4
PERCEPTUAL_FROM = 0.6  # of the steps are done when the perceptual distance, which doubles a step's cost, joins the loss
HELD_OUT = 64
REPORT_EVERY = 250
# Brightness, orange against blue, green against purple: each one's direction in RGB, over its deviation between 8 x 8 pixels.
OPPONENT_COLOURS = ((0.84, 0.84, 0.84), (2.04, 0.0, -2.04), (-2.51, 5.01, -2.51))


@dataclass
class Collection:
    """All images at 128 px, (N, 128, 128, 3) uint8, and which of them play which part."""

    pixels: Tensor
    favoured: Tensor  # rows in the styles and groups that the base draws: half of every batch
    training: Tensor
    held_out: Tensor

    @classmethod
    def read(cls, images: Images) -> Collection:
        files = [(style, path) for style in AUTOENCODER_STYLES for path in images.files(style)]
        pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path).convert("RGB")) for _, path in files]))
        codes = {code for code, group in images.groups().items() if group in NAMES}
        favoured = torch.tensor([style in STYLES.values() and path.stem in codes for style, path in files])
        rows = torch.randperm(len(files), generator=torch.Generator().manual_seed(5))
        held_out = rows[~favoured[rows]][:HELD_OUT]
        training = rows[~torch.isin(rows, held_out)]
        return cls(pixels, favoured.nonzero().flatten(), training, held_out)

    def batch(self, count: int) -> Tensor:
        """(count, 3, 64, 64) in -1..1."""
        favoured = self.favoured[torch.randint(len(self.favoured), (count,))]
        any_of_all = self.training[torch.randint(len(self.training), (count,))]
        return self._small(torch.where(torch.rand(count) < 0.5, favoured, any_of_all), augmented)

    def plain(self, rows: Tensor) -> Tensor:
        return self._small(rows, lambda images: images)

    def _small(self, rows: Tensor, change) -> Tensor:
        images = self.pixels[rows].permute(0, 3, 1, 2).float() / 255
        return F.avg_pool2d(change(images), 2) * 2 - 1


class Progress:
    """Goes on from the checkpoint; every so often a line with figures of `vae` on held-out images, and a new checkpoint."""

    def __init__(
        self, steps: int, vae: nn.Module, collection: Collection, perceptual: Perceptual, checkpoint: Checkpoint
    ) -> None:
        self.steps, self.vae, self.perceptual, self.checkpoint = steps, vae, perceptual, checkpoint
        self.shown = collection.plain(collection.held_out)
        self.first, self.started = checkpoint.load(), time.time()

    def after(self, step: int) -> None:
        done = step + 1
        if done % REPORT_EVERY and done != self.steps:
            return
        speed = (done - self.first) * BATCH / (time.time() - self.started)
        drawn = reconstructed(self.vae, self.shown)
        distance = float(self.perceptual.distance(drawn, self.shown))
        print(
            f"{time.strftime('%H:%M:%S')} VAE step {done}/{self.steps}: held-out PSNR {psnr(drawn, self.shown):.2f} dB, "
            f"LPIPS {distance:.3f}, green and purple kept {green_and_purple(drawn, self.shown):.0%}, {speed:.1f} images/s",
            flush=True,
        )
        self.checkpoint.save(done)


def new_autoencoder(seed: int) -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL.from_config(vae_config(CHANNELS, layers=LAYERS))
    _see_opponent_colours(vae)
    return vae


@torch.no_grad()
def _see_opponent_colours(vae: nn.Module) -> None:
    """Let the random first and last convolution take and give opponent colours: else green and purple come late by thousands
    of steps.
    """
    colours = torch.tensor(OPPONENT_COLOURS)
    first, last = vae.encoder.conv_in.weight, vae.decoder.conv_out.weight
    first.copy_(torch.einsum("oihw,ij->ojhw", first, colours))
    last.copy_(torch.einsum("ij,jchw->ichw", colours.inverse(), last))


def opponent(images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in -1..1 -> brightness, orange against blue, green against purple, each of deviation 1."""
    return torch.einsum("ij,bjhw->bihw", torch.tensor(OPPONENT_COLOURS), images)


def difference(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Mean error of pixels, of edges, and of hues, which are the last to be learnt."""
    error = drawn - wanted
    hues = opponent(error)[:, 1:]
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    pixels = error.abs().mean() + 0.5 * error.square().mean() + 0.5 * F.avg_pool2d(error, 8).abs().mean()
    return pixels + 0.5 * edges + 0.25 * hues.abs().mean() + 0.25 * F.avg_pool2d(hues, 4).abs().mean()


def train_autoencoder(collection: Collection, perceptual: Perceptual, work: Path, steps: int, seed: int = 1) -> nn.Module:
    """The VAE with averaged weights after `steps` steps, its latents scaled; goes on from the checkpoint in `work`."""
    vae = new_autoencoder(seed)
    colour_reader = nn.Conv2d(LATENT_CHANNELS, 3, kernel_size=1)
    parameters = [*vae.parameters(), *colour_reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    average = Average((vae, colour_reader), EMA_DECAY)
    checkpoint = Checkpoint(work / "autoencoder.pt", average, optimizer)
    progress = Progress(steps, average.averages[0], collection, perceptual, checkpoint)
    for step in range(progress.first, steps):
        loss = _loss(vae, colour_reader, collection.batch(BATCH), step / steps, perceptual)
        loss.backward()
        clip_and_step(optimizer, rate_at(step, steps, PEAK_RATE))
        average.update(step)
        progress.after(step)
    result = average.averages[0]
    every = max(1, len(collection.favoured) // 512)
    scale_latents(result, collection.plain(collection.favoured[::every]))  # of all styles
    return result


def _loss(vae: nn.Module, colour_reader: nn.Module, images: Tensor, done: float, perceptual: Perceptual) -> Tensor:
    """`done`: the part of the steps that are done, 0..1.

    The colour reader tells the mean colour of 8 x 8 pixels from a latent: this draws all three colours into the latents early.
    """
    posterior = vae.encode(images).latent_dist
    latents = posterior.sample()
    drawn = softly_clipped(vae.decode(latents).sample)
    colours = (colour_reader(latents) - opponent(F.avg_pool2d(images, 8))).abs().mean()
    kl = posterior.kl().mean() / latents[0].numel()
    loss = difference(drawn, images) + KL_WEIGHT * kl + max(0.1, 1 - 2 * done) * colours
    return loss if done < PERCEPTUAL_FROM else loss + perceptual.distance(drawn, images)


def softly_clipped(drawn: Tensor) -> Tensor:
    """Beyond white and black is hardly wrong: it is clipped when it is shown."""
    return drawn.clamp(-1, 1) + 0.1 * (drawn - drawn.clamp(-1, 1))


@torch.no_grad()
def reconstructed(vae: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in -1..1 through the VAE."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in images.split(16)])


def psnr(drawn: Tensor, images: Tensor) -> float:
    """Mean peak signal-to-noise ratio, dB, of images (B, 3, H, W) in -1..1."""
    return float((-10 * ((drawn - images) / 2).square().mean(dim=(1, 2, 3)).log10()).mean())


def green_and_purple(drawn: Tensor, images: Tensor) -> float:
    """The part of the variance, over 8 x 8 pixels, from green to purple that is drawn: 1 when all is, 0 or less when none is."""
    wanted, found = (opponent(F.avg_pool2d(part, 8))[:, 2] for part in (images, drawn))
    return float(1 - (found - wanted).square().mean() / wanted.var())


@torch.no_grad()
def scale_latents(vae: nn.Module, images: Tensor) -> None:
    """Give the latents mean 0 and, times 0.18215, deviation 1, by folding both into the 1 x 1 convolutions around them."""
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(16)])
    mean = latents.mean(dim=(0, 2, 3))
    factor = 1 / (LatentSpace().scale * (latents - mean[:, None, None]).std())
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    bias[:LATENT_CHANNELS] -= mean
    weight[:LATENT_CHANNELS] *= factor
    bias[:LATENT_CHANNELS] *= factor
    bias[LATENT_CHANNELS:] += 2 * factor.log()  # the log variance of the posterior grows along
    decode = vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight /= factor
