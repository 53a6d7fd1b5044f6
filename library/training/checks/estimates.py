"""What a run will need, before it begins: size of its files, memory. Counted from the shapes of the model's weights, but rough.

What a U-Net with a LoRA keeps until the backward pass was counted on tensors without content for SD 1.5 and SDXL, with attention
that keeps no matrix and the types that autocast chooses on a CPU. The constants below are what fits both; the count for SSD-1B
and KOALA is met within a tenth.
"""

from __future__ import annotations

import math
import re

from library.data.dataset import TrainingDataset
from library.key_values import read_pairs
from library.models.clip import CHUNK
from library.models.family import Shapes
from library.models.loading import Header
from library.training.memory.packing import FORMATS
from library.training.optimization.optimizers import optimizer_name, spec_named
from library.training.options import TrainNetworkOptions

# Layers that get a LoRA by default, and those that get one with conv_dim.
TEXT_LAYERS = r"\.(?:self_attn|mlp)\."
ATTENTION_LAYERS = r"\.attentions\."
CONV_LAYERS = r"\.(?:resnets|downsamplers|upsamplers)\."

# Bytes of 16-bit activations for each channel and position, without and with gradient checkpointing, of one of these.
KEPT = {
    r"\.transformer_blocks\.\d+\.norm1\.weight": (53.8, 2.0),
    r"\.attentions\.\d+\.norm\.weight": (0.0, 5.9),  # what is around the blocks of a transformer
    r"\.resnets\.\d+\.norm2\.weight": (18.8, 3.9),
}

WORKSPACE = 1.4  # what is computed on top of what is kept, and what the allocator cannot use
CUDA_CONTEXT = 600 * 2**20


def lora_numbers(shapes: Shapes, layers: str) -> int:
    """Numbers of a LoRA of rank 1 for the weights whose names match: inputs plus outputs of each."""
    chosen = [shape for name, shape in shapes.items() if len(shape) > 1 and re.search(layers, name)]
    return sum(shape[0] + math.prod(shape[1:]) for shape in chosen)


def network_numbers(options: TrainNetworkOptions, header: Header) -> int:
    """Trained numbers of a LoRA; other network modules are of the same order."""
    network, numbers, conv_numbers = options.network, 0, 0
    for part in header.family.parts:
        shapes = header.shapes.get(part.name, {})
        if part.role == "text" and not network.network_train_unet_only:
            numbers += lora_numbers(shapes, TEXT_LAYERS)
        elif part.role == "denoiser" and not network.network_train_text_encoder_only:
            numbers += lora_numbers(shapes, ATTENTION_LAYERS)
            conv_numbers += lora_numbers({name: shape for name, shape in shapes.items() if shape[2:] == (3, 3)}, CONV_LAYERS)
    conv = read_pairs(network.network_args, "--network_args").get("conv_dim", "0")
    return numbers * (network.network_dim or 4) + conv_numbers * (int(conv) if conv.isdecimal() else 0)


def network_file_bytes(options: TrainNetworkOptions, header: Header) -> int:
    """Size of one saved file."""
    precision, full = options.output.save_precision, options.precision.full_fp16 or options.precision.full_bf16
    half = precision in ("fp16", "bf16") or (precision is None and full)
    return network_numbers(options, header) * (2 if half else 4)


def state_bytes(options: TrainNetworkOptions, header: Header) -> int:
    """Size of one saved state: the weights, the optimizer's numbers for each, and the average."""
    spec = spec_named(optimizer_name(options.optimizer))
    moments = spec.moments * spec.moment_bits // 8
    return network_numbers(options, header) * (4 + moments + (4 if options.validation.ema_decay else 0))


def encoded_text_bytes(options: TrainNetworkOptions, header: Header) -> int:
    """Size of what the text encoders make of one caption: a context that is as wide as the denoiser's attention reads it."""
    shapes = next((header.shapes.get(part.name, {}) for part in header.family.parts if part.role == "denoiser"), {})
    width = next((shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight")), 0)
    return ((options.captions.max_token_length or CHUNK) + 2) * width * number_bytes(options)


def estimated_bytes(options: TrainNetworkOptions, header: Header, batch: int, size: tuple[int, int]) -> int:
    """What is fixed, and the activations of a batch of so many images of this size (width, height)."""
    positions = batch * math.prod(size) // header.family.latents.pixels_per_latent**2 * (1 if is_half(options) else 2) * WORKSPACE
    fixed, training = fixed_bytes(options, header), options.training
    kept, kept_with_checkpointing = kept_bytes(header)
    needed = fixed + positions * (kept_with_checkpointing if training.gradient_checkpointing else kept)
    if training.gradient_checkpointing and training.gradient_checkpointing_budget:
        needed = max(needed, min(fixed + positions * kept, training.gradient_checkpointing_budget * 2**30))
    return int(needed)


def kept_bytes(header: Header) -> tuple[float, float]:
    """Bytes of 16-bit activations for each position of a latent, without and with gradient checkpointing.

    On each level of the U-Net a position stands for four of the level before.
    """
    shapes = next((header.shapes.get(part.name, {}) for part in header.family.parts if part.role == "denoiser"), {})
    levels = 1 + max((int(found[1]) for name in shapes if (found := re.match(r"down_blocks\.(\d+)\.", name))), default=0)
    kept = [0.0, 0.0]
    for name, shape in shapes.items():
        per_channel = next((bytes_each for layer, bytes_each in KEPT.items() if re.search(layer, name)), None)
        if per_channel is not None:
            for index, number in enumerate(per_channel):
                kept[index] += number * shape[0] / 4 ** _level(name, levels)
    return kept[0], kept[1]


def _level(name: str, levels: int) -> int:
    """How often the latent was halved before this layer of a U-Net."""
    found = re.match(r"(down|up)_blocks\.(\d+)\.", name)
    if found is None:
        return levels - 1
    return int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])


def fixed_bytes(options: TrainNetworkOptions, header: Header) -> float:
    """Frozen model, and the LoRA with gradients and two moments."""
    return CUDA_CONTEXT + frozen_bytes(options, header) + network_numbers(options, header) * 16


def frozen_bytes(options: TrainNetworkOptions, header: Header) -> float:
    """The frozen model, packed as the options say."""
    formats = base_formats(options)
    total = 0.0
    for part in header.family.parts:
        shapes = header.shapes.get(part.name, {})
        total += numbers_in(shapes) * number_bytes(options)
        name = {"denoiser": formats["unet"], "text": formats["text_encoder"]}.get(part.role)
        if name:  # biases, norms and embeddings stay
            packed = {key: shape for key, shape in shapes.items() if len(shape) > 1 and "embedding.weight" not in key}
            total -= numbers_in(packed) * (number_bytes(options) - FORMATS[name].bits / 8)
    return total


def numbers_in(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def base_formats(options: TrainNetworkOptions) -> dict[str, str | None]:
    """The formats in which --base_dtype, --fp8_base and --fp8_base_unet keep the frozen parts; None: that of the arithmetic."""
    chosen = options.precision
    both = chosen.base_dtype or ("fp8" if chosen.fp8_base else None)
    return {"unet": both or ("fp8" if chosen.fp8_base_unet else None), "text_encoder": both}


def is_half(options: TrainNetworkOptions) -> bool:
    return options.training.mixed_precision != "no"


def number_bytes(options: TrainNetworkOptions) -> int:
    """Bytes of a number of the frozen model before it is packed."""
    return 2 if is_half(options) else 4


def largest_batch(dataset: TrainingDataset) -> tuple[int, tuple[int, int]]:
    """Number and size (width, height) of the images of the batch that has most pixels."""
    batches = [(dataset.table.configs[bucket.dataset].batch_size, bucket.size) for bucket in dataset.table.buckets]
    return max(batches, key=lambda batch: batch[0] * batch[1][0] * batch[1][1])
