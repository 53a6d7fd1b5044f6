"""What the options say about memory and speed of the frozen model, once the network is attached to it."""

from __future__ import annotations

import torch

from library.sd.model import StableDiffusion
from library.training.compiling import compile_in_place
from library.training.fp8 import store_as_fp8
from library.training.options import TrainNetworkOptions


def pack_frozen_weights(options: TrainNetworkOptions, model: StableDiffusion) -> None:
    """--fp8_base and --fp8_base_unet: 8 bits for the large weights, from now on."""
    chosen = options.precision
    parts = [model.unet] * (chosen.fp8_base or chosen.fp8_base_unet) + [model.text_encoder] * chosen.fp8_base
    saved = sum(store_as_fp8(part) for part in parts)
    if not saved:
        return
    print(f"frozen weights in 8 bits: {saved / 2**20:.0f} MiB less")
    if not options.training.gradient_checkpointing:
        print("without --gradient_checkpointing the unpacked weights of all layers wait for the backward pass: add it to save memory")


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
