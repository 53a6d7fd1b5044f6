"""What the options say about memory and speed of the frozen model, once the network is attached to it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from library.freed_memory import give_back_freed_memory
from library.models.family import Model
from library.training.checks.estimates import base_formats
from library.training.memory.compiling import compile_in_place
from library.training.memory.packing import CLASSES, pack_weights
from library.training.options import TrainNetworkOptions


def pack_frozen_weights(options: TrainNetworkOptions, model: Model, device: torch.device) -> None:
    """--base_dtype, --fp8_base and --fp8_base_unet: 8 or 4 bits for the large weights from now on, the U-Net on the device."""
    formats = base_formats(options)
    unet_format, text_format = formats["unet"], formats["text_encoder"]
    if not unet_format:
        return
    saved = pack_weights(model.denoiser, unet_format, device)
    model.denoiser.to(device)
    if text_format:
        saved += sum(pack_weights(encoder, text_format) for encoder in model.text_encoders)  # may be idle, on the CPU
    print(f"frozen weights in {unet_format}: {saved / 2**20:.0f} MiB less")
    packed = [layer for layer in model.denoiser.modules() if isinstance(layer, tuple(CLASSES.values()))]
    if not options.training.gradient_checkpointing and any("forward" in vars(layer) for layer in packed):
        print(
            "this network module keeps the unpacked weights until the backward pass: add --gradient_checkpointing to save memory"
        )


def compile_model(options: TrainNetworkOptions, model: Model, trains_text_encoder: bool) -> None:
    """--torch_compile."""
    if options.precision.torch_compile:
        compile_in_place(
            [model.denoiser, *(model.text_encoders if trains_text_encoder else [])], options.precision.dynamo_backend
        )


def offload_idle_parts(options: TrainNetworkOptions, idle: Iterable[nn.Module], *, keep_for_previews: bool) -> None:
    """Take parts of the model that training does not use off the GPU, or free them for good where no preview needs them.

    Previews fetch them back for their images. With --lowram main memory is the scarcer one, and with --highvram none is scarce:
    then parts that previews need stay where they are.
    """
    if keep_for_previews and (options.precision.lowram or options.precision.highvram):
        return
    for part in idle:
        part.to("cpu" if keep_for_previews else "meta")
    give_back_freed_memory()
    if torch.cuda.is_available() and not options.precision.highvram:
        torch.cuda.empty_cache()
