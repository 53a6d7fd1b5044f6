"""What a run will need, before it begins: size of its files, memory. Counted from the shapes of the model's weights, but rough.

What a U-Net with a LoRA keeps until the backward pass was counted on tensors without content for SD 1.5 and SDXL, with attention
that keeps no matrix and the types that autocast chooses on a CPU. The constants below are what fits both; the count for SSD-1B
and KOALA is met within a tenth.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from library.data.dataset import TrainingDataset
from library.devices import DTYPES
from library.key_values import read_pairs
from library.models.family import Shapes
from library.models.loading import Header
from library.training.memory.packing import FORMATS
from library.training.memory.precision import NumberFormats
from library.training.optimization.optimizers import optimizer_name, spec_named
from library.training.options import NetworkOptions, TrainNetworkOptions

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


@dataclass(frozen=True)
class FileSizes:
    """Bytes of one saved file of the network, and of one saved state."""

    network: int
    state: int


def file_sizes(options: TrainNetworkOptions, header: Header) -> FileSizes:
    """A state has the weights in float32, the optimizer's moments of each, and the average."""
    parameters, precision = network_parameters(options.network, header), options.output.save_precision
    saved = DTYPES[precision] if precision else NumberFormats.of(options.training, options.precision).trained
    spec = spec_named(optimizer_name(options.optimizer))
    average = 4 if options.validation.ema_decay else 0
    return FileSizes(parameters * saved.itemsize, parameters * (4 + spec.moments * spec.moment_bits // 8 + average))


def network_parameters(options: NetworkOptions, header: Header) -> int:
    """Parameters of a LoRA; other network modules have as many within an order of magnitude."""
    found, in_convolutions = 0, 0
    for part in header.family.parts:
        shapes = header.shapes.get(part.name, {})
        if part.role == "text" and not options.network_train_unet_only:
            found += lora_parameters(shapes, TEXT_LAYERS)
        elif part.role == "denoiser" and not options.network_train_text_encoder_only:
            found += lora_parameters(shapes, ATTENTION_LAYERS)
            kernels = {name: shape for name, shape in shapes.items() if shape[2:] == (3, 3)}
            in_convolutions += lora_parameters(kernels, CONV_LAYERS)
    conv = read_pairs(options.network_args, "--network_args").get("conv_dim", "0")
    return found * (options.network_dim or 4) + in_convolutions * (int(conv) if conv.isdecimal() else 0)


def lora_parameters(shapes: Shapes, layers: str) -> int:
    """Parameters of a LoRA of rank 1 for the weights whose names match: inputs plus outputs of each."""
    chosen = [shape for name, shape in shapes.items() if len(shape) > 1 and re.search(layers, name)]
    return sum(shape[0] + math.prod(shape[1:]) for shape in chosen)


def encoded_text_bytes(tokens: int, formats: NumberFormats, header: Header) -> int:
    """Size of one encoded caption: a context that is as wide as the denoiser's attention reads it."""
    shapes = next((header.shapes.get(part.name, {}) for part in header.family.parts if part.role == "denoiser"), {})
    width = next((shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight")), 0)
    return tokens * width * formats.arithmetic.itemsize


def estimated_bytes(options: TrainNetworkOptions, header: Header, batch: int, size: tuple[int, int]) -> int:
    """Memory of a run: what is fixed, and the activations of a batch. size: width and height of its images."""
    training, formats = options.training, NumberFormats.of(options.training, options.precision)
    positions = batch * math.prod(size) // header.family.latents.pixels_per_latent**2
    of_16_bits = positions * formats.arithmetic.itemsize / 2 * WORKSPACE
    fixed = fixed_bytes(formats, options.network, header)
    kept, kept_with_checkpointing = kept_bytes(header)
    needed = fixed + of_16_bits * (kept_with_checkpointing if training.gradient_checkpointing else kept)
    if training.gradient_checkpointing and training.gradient_checkpointing_budget:
        needed = max(needed, min(fixed + of_16_bits * kept, training.gradient_checkpointing_budget * 2**30))
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


def fixed_bytes(formats: NumberFormats, network: NetworkOptions, header: Header) -> float:
    """Frozen model, and the LoRA with gradients and two moments."""
    return CUDA_CONTEXT + frozen_bytes(formats, header) + network_parameters(network, header) * 16


def frozen_bytes(formats: NumberFormats, header: Header) -> float:
    """The frozen model, its large weights packed."""
    total = 0.0
    for part in header.family.parts:
        shapes = header.shapes.get(part.name, {})
        total += parameters_in(shapes) * formats.arithmetic.itemsize
        name = {"denoiser": formats.unet, "text": formats.text_encoder}.get(part.role)
        if name:  # biases, norms and embeddings stay
            packed = {key: shape for key, shape in shapes.items() if len(shape) > 1 and "embedding.weight" not in key}
            total -= parameters_in(packed) * (formats.arithmetic.itemsize - FORMATS[name].bits / 8)
    return total


def parameters_in(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def largest_batch(dataset: TrainingDataset) -> tuple[int, tuple[int, int]]:
    """Number and size (width, height) of the images of the batch that has most pixels."""
    batches = [(dataset.table.configs[bucket.dataset].batch_size, bucket.size) for bucket in dataset.table.buckets]
    return max(batches, key=lambda batch: batch[0] * batch[1][0] * batch[1][1])
