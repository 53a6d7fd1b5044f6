"""The VAE, trained from nothing on the pictures of all styles but fluenthc and fluentflat.

64 channels where the picture has its full size: group norm has 32 groups, and groups of a single channel would take away each
channel's mean, and with it the colours (tried: after 11,000 pictures everything was still grey).
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from library.sd.architecture import LATENT_CHANNELS, SCALING_FACTOR, vae_config
from tools.base_model.augment import augmented
from tools.base_model.names import AUTOENCODER_STYLES, NAMES, STYLES
from tools.base_model.pictures import Pictures
from tools.base_model.training import Average, Checkpoint, clip_and_step, rate_at

CHANNELS, LAYERS = (64, 32, 64, 128), 1
BATCH = 4
PEAK_RATE = 1.2e-3
POLISHING_RATE = 6e-4
EMA_DECAY = 0.997
KL_WEIGHT = 1e-4
HELD_OUT = 64
REPORT_EVERY = 500


@dataclass
class Collection:
    """All pictures at 128 px, (N, 128, 128, 3) uint8, and which of them play which part."""

    pixels: Tensor
    favoured: Tensor  # rows in the styles and groups that the base draws: half of every batch
    training: Tensor
    held_out: Tensor

    @classmethod
    def read(cls, pictures: Pictures) -> Collection:
        files = [(style, path) for style in AUTOENCODER_STYLES for path in pictures.files(style)]
        pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path).convert("RGB")) for _, path in files]))
        codes = {code for code, group in pictures.groups().items() if group in NAMES}
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
        return self._small(rows, lambda pictures: pictures)

    def _small(self, rows: Tensor, change) -> Tensor:
        pictures = self.pixels[rows].permute(0, 3, 1, 2).float() / 255
        return F.avg_pool2d(change(pictures), 2) * 2 - 1


class Progress:
    """Goes on from the checkpoint; every so often a line with the held-out PSNR of `vae`, and a new checkpoint."""

    def __init__(self, what: str, steps: int, vae: nn.Module, collection: Collection, checkpoint: Checkpoint) -> None:
        self.what, self.steps, self.vae, self.collection, self.checkpoint = what, steps, vae, collection, checkpoint
        self.first, self.started = checkpoint.load(), time.time()

    def after(self, step: int) -> None:
        done = step + 1
        if done % REPORT_EVERY and done != self.steps:
            return
        speed = (done - self.first) * BATCH / (time.time() - self.started)
        held_out = psnr(self.vae, self.collection.plain(self.collection.held_out))
        moment = f"{time.strftime('%H:%M:%S')} {self.what} step {done}/{self.steps}"
        print(f"{moment}: held-out PSNR {held_out:.2f} dB, {speed:.1f} pictures/s", flush=True)
        self.checkpoint.save(done)


def new_autoencoder(seed: int) -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL.from_config(vae_config(CHANNELS, layers=LAYERS))


def difference(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Mean error of pixels, of edges, and of colours: those apart from brightness, since they are the last to be learnt."""
    error = drawn - wanted
    colour = error - error.mean(dim=1, keepdim=True)
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    pixels = error.abs().mean() + 0.5 * error.square().mean() + 0.5 * F.avg_pool2d(error, 8).abs().mean()
    return pixels + 0.5 * edges + colour.abs().mean() + 0.5 * F.avg_pool2d(colour, 4).abs().mean()


def train_autoencoder(collection: Collection, work: Path, steps: int, seed: int = 1) -> nn.Module:
    """The VAE with averaged weights after `steps` steps, its latents scaled; goes on from the checkpoint in `work`."""
    vae = new_autoencoder(seed)
    # Reads the mean colour of 8 x 8 pixels from a latent: for the first half it draws colours into the latents.
    colour_reader = nn.Conv2d(LATENT_CHANNELS, 3, kernel_size=1)
    parameters = [*vae.parameters(), *colour_reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    average = Average((vae, colour_reader), EMA_DECAY)
    checkpoint = Checkpoint(work / "autoencoder.pt", average, optimizer)
    progress = Progress("VAE", steps, average.averages[0], collection, checkpoint)
    for step in range(progress.first, steps):
        pictures = collection.batch(BATCH)
        loss = _loss(vae, colour_reader, pictures, colour_weight=2 * max(0.0, 0.5 - step / steps))
        loss.backward()
        clip_and_step(optimizer, rate_at(step, steps, PEAK_RATE))
        average.update(step)
        progress.after(step)
    result = average.averages[0]
    every = max(1, len(collection.favoured) // 512)
    scale_latents(result, collection.plain(collection.favoured[::every]))  # of all styles
    return result


def _loss(vae: nn.Module, colour_reader: nn.Module, pictures: Tensor, colour_weight: float) -> Tensor:
    posterior = vae.encode(pictures).latent_dist
    latents = posterior.sample()
    drawn = softly_clipped(vae.decode(latents).sample)
    colours = (colour_reader(latents) - F.avg_pool2d(pictures, 8)).abs().mean()
    kl = posterior.kl().mean() / latents[0].numel()
    return difference(drawn, pictures) + KL_WEIGHT * kl + colour_weight * colours


def polish_decoder(vae: nn.Module, collection: Collection, work: Path, steps: int) -> nn.Module:
    """The VAE with a decoder trained further on its own, averaged: sharper pictures from the very same latents.

    The U-Net learns the latents only, so this may run beside its training. Goes on from the checkpoint in `work`.
    """
    parts = (copy.deepcopy(vae.decoder).requires_grad_(True), copy.deepcopy(vae.post_quant_conv).requires_grad_(True))
    decoder, post_quant_conv = parts
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=POLISHING_RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    average = Average(parts, EMA_DECAY)
    checkpoint = Checkpoint(work / "decoder.pt", average, optimizer)
    polished = copy.copy(vae)
    polished._modules = {**vae._modules, "decoder": average.averages[0], "post_quant_conv": average.averages[1]}
    progress = Progress("decoder", steps, polished, collection, checkpoint)
    for step in range(progress.first, steps):
        pictures = collection.batch(BATCH)
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.sample()
        difference(softly_clipped(decoder(post_quant_conv(latents))), pictures).backward()
        clip_and_step(optimizer, rate_at(step, steps, POLISHING_RATE))
        average.update(step)
        progress.after(step)
    return polished


def softly_clipped(drawn: Tensor) -> Tensor:
    """Beyond white and black is hardly wrong: it is clipped when it is shown."""
    return drawn.clamp(-1, 1) + 0.1 * (drawn - drawn.clamp(-1, 1))


@torch.no_grad()
def psnr(vae: nn.Module, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio, dB, of pictures (B, 3, H, W) in -1..1 through the VAE."""
    drawn = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in pictures.split(16)])
    return float((-10 * ((drawn - pictures) / 2).square().mean(dim=(1, 2, 3)).log10()).mean())


@torch.no_grad()
def scale_latents(vae: nn.Module, pictures: Tensor) -> None:
    """Give the latents mean 0 and, times 0.18215, deviation 1, by folding both into the 1 x 1 convolutions around them."""
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(16)])
    mean = latents.mean(dim=(0, 2, 3))
    factor = 1 / (SCALING_FACTOR * (latents - mean[:, None, None]).std())
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    bias[:LATENT_CHANNELS] -= mean
    weight[:LATENT_CHANNELS] *= factor
    bias[:LATENT_CHANNELS] *= factor
    bias[LATENT_CHANNELS:] += 2 * factor.log()  # the log variance of the posterior grows along
    decode = vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight /= factor
