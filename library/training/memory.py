"""What the options say about memory and speed of the frozen model, once the network is attached to it."""

from __future__ import annotations

import torch

from library.devices import give_back_freed_memory
from library.models.model import StableDiffusion
from library.training.compiling import compile_in_place
from library.training.estimates import base_formats
from library.training.options import TrainNetworkOptions
from library.training.packing import CLASSES, pack_weights


def pack_frozen_weights(options: TrainNetworkOptions, model: StableDiffusion, device: torch.device) -> None:
    """--base_dtype, --fp8_base and --fp8_base_unet: 8 or 4 bits for the large weights from now on, the U-Net on the device."""
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
        print(
            "this network module keeps the unpacked weights until the backward pass: add --gradient_checkpointing to save memory"
        )


def compile_model(options: TrainNetworkOptions, model: StableDiffusion, trains_text_encoder: bool) -> None:
    """--torch_compile."""
    if options.precision.torch_compile:
        compile_in_place([model.unet, *([model.text_encoder] if trains_text_encoder else [])], options.precision.dynamo_backend)


def free_what_rests(
    options: TrainNetworkOptions, model: StableDiffusion, *, vae_rests: bool, text_encoder_rests: bool, draws: bool
) -> None:
    """Free the memory of the parts that training does not touch: all of it, unless previews are drawn.

    For these they move off the GPU, and are fetched back for the pictures. With --lowram main memory is the scarcer one, and with
    --highvram nothing is scarce: then they stay.
    """
    if draws and (options.precision.lowram or options.precision.highvram):
        return
    resting = [part for part, rests in ((model.vae, vae_rests), (model.text_encoder, text_encoder_rests)) if rests]
    for part in resting:
        part.to("cpu" if draws else "meta")
    give_back_freed_memory()
    if torch.cuda.is_available() and not options.precision.highvram:
        torch.cuda.empty_cache()
