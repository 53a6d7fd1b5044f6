"""The form of the frozen model in memory, once the network is attached: packed, compiled, offloaded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from library.freed_memory import give_back_freed_memory
from library.models.family import Model
from library.training.memory.compiling import WHOLE, compile_in_place
from library.training.memory.packing import CLASSES, pack_weights
from library.training.memory.precision import NumberFormats
from library.training.options import PrecisionOptions


def pack_frozen_weights(formats: NumberFormats, model: Model, device: torch.device, gradient_checkpointing: bool) -> None:
    """--base_dtype, --fp8_base and --fp8_base_unet: 8 or 4 bits for the large weights from now on, the U-Net on the device."""
    if not formats.unet:
        return
    saved = pack_weights(model.denoiser, formats.unet, device)
    model.denoiser.to(device)
    if formats.text_encoder:
        saved += sum(pack_weights(encoder, formats.text_encoder) for encoder in model.text_encoders)  # may be idle, on the CPU
    give_back_freed_memory()  # 0.8 GB of SD 1.5 in int8 on a CPU
    print(f"frozen weights in {formats.unet}: {saved / 2**20:.0f} MiB less")
    packed = [layer for layer in model.denoiser.modules() if isinstance(layer, tuple(CLASSES.values()))]
    if not gradient_checkpointing and any("forward" in vars(layer) for layer in packed):
        print(
            "this network module keeps the unpacked weights until the backward pass: add --gradient_checkpointing to save memory"
        )


def compile_model(options: PrecisionOptions, model: Model, trains_text_encoder: bool) -> None:
    """--torch_compile."""
    if options.torch_compile:
        compile_in_place([model.denoiser, *(model.text_encoders if trains_text_encoder else [])], options.dynamo_backend)


def compiles_whole_models(options: PrecisionOptions) -> bool:
    """Whether --torch_compile takes every layer: then it drops by itself what frozen ones need not keep."""
    return options.torch_compile and options.dynamo_backend in WHOLE


def offload_idle_parts(options: PrecisionOptions, idle: Iterable[nn.Module], *, keep_for_previews: bool) -> None:
    """Move parts that training does not use to main memory, or free them for good if no preview needs them.

    Previews move them back while they draw. With --lowram (main memory is short) and with --highvram (GPU memory is plentiful)
    parts that previews need stay where they are.
    """
    if keep_for_previews and (options.lowram or options.highvram):
        return
    for part in idle:
        part.to("cpu" if keep_for_previews else "meta")
    if torch.accelerator.is_available():  # else the first step uses it again
        give_back_freed_memory()
    if torch.cuda.is_available() and not options.highvram:
        torch.cuda.empty_cache()
