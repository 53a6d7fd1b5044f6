"""What the options say about memory and speed of the frozen model, once the network is attached to it."""

from __future__ import annotations

import torch

from library.sd.model import StableDiffusion
from library.training.compiling import compile_in_place
from library.training.estimates import base_formats
from library.training.options import TrainNetworkOptions
from library.training.packing import CLASSES, pack_weights


def pack_frozen_weights(options: TrainNetworkOptions, model: StableDiffusion, device: torch.device) -> None:
    """--base_dtype, --fp8_base and --fp8_base_unet: 8 or 4 bits for the large weights, from now on, and the U-Net on the device."""
    formats = base_formats(options)
    if not formats["unet"]:
        return
    saved = pack_weights(model.unet, formats["unet"], device)
    model.unet.to(device)
    if formats["text_encoder"]:
        saved += pack_weights(model.text_encoder, formats["text_encoder"])  # where it is: it may rest
    print(f"frozen weights in {formats['unet']}: {saved / 2**20:.0f} MiB less")
    packed = [layer for layer in model.unet.modules() if isinstance(layer, tuple(CLASSES.values()))]
    if not options.training.gradient_checkpointing and any("forward" in vars(layer) for layer in packed):
        print("this network module keeps the unpacked weights until the backward pass: add --gradient_checkpointing to save memory")


def compile_model(options: TrainNetworkOptions, model: StableDiffusion, trains_text_encoder: bool) -> None:
    """--torch_compile."""
    if options.precision.torch_compile:
        compile_in_place([model.unet, *([model.text_encoder] if trains_text_encoder else [])], options.precision.dynamo_backend)


def free_what_rests(options: TrainNetworkOptions, model: StableDiffusion, *, vae_rests: bool, text_encoder_rests: bool) -> None:
    """Move the parts that training does not touch off the GPU; previews fetch them when they need them.

    With --lowram main memory is the scarcer one, and with --highvram nothing is scarce: then they stay.
    """
    if options.precision.lowram or options.precision.highvram:
        return
    if vae_rests:
        model.vae.to("cpu")
    if text_encoder_rests:
        model.text_encoder.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
