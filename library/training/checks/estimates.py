"""What a run will need, before it begins: size of its files, memory. Rough numbers for full-size models."""

from __future__ import annotations

import math
from pathlib import Path

from library.data.dataset import TrainingDataset
from library.key_values import read_pairs
from library.training.memory.packing import FORMATS
from library.training.optimization.optimizers import optimizer_name, spec_named
from library.training.options import TrainNetworkOptions

# Numbers of a LoRA per rank, from the shapes of SD 1.5 and 2.1 (Linear and 1x1 layers of attention; 3x3 convolutions).
TEXT_NUMBERS = {False: 165_888, True: 423_936}
UNET_NUMBERS = {False: 423_936, True: 432_128}
CONV_NUMBERS = 626_880

# Parameters of the frozen parts, used if the model is no single file.
FROZEN_NUMBERS = {False: 1_066_000_000, True: 1_290_000_000}

# Those of them that --base_dtype packs.
PACKED_NUMBERS = {"unet": {False: 859_077_120, True: 865_466_880}, "text_encoder": {False: 84_934_656, True: 289_406_976}}

# Bytes of 16-bit activations that SD 1.5's U-Net with a LoRA keeps for each position of a latent (8 x 8 pixels) until the
# backward pass: 206 kB, and 33 kB with gradient checkpointing. Counted on tensors without content, with attention that keeps no
# matrix and the types that autocast chooses on a CPU.
KEPT, KEPT_WITH_CHECKPOINTING = 206_000, 33_000
WORKSPACE = 1.4  # what is computed on top of what is kept, and what the allocator cannot use
CUDA_CONTEXT = 600 * 2**20


def network_numbers(options: TrainNetworkOptions) -> int:
    """Trained numbers of a LoRA; other network modules are of the same order."""
    network, v2 = options.network, options.model.v2
    numbers = 0 if network.network_train_unet_only else TEXT_NUMBERS[v2]
    numbers += 0 if network.network_train_text_encoder_only else UNET_NUMBERS[v2]
    conv = read_pairs(network.network_args, "--network_args").get("conv_dim", "0")
    return numbers * (network.network_dim or 4) + CONV_NUMBERS * (int(conv) if conv.isdecimal() else 0)


def network_file_bytes(options: TrainNetworkOptions) -> int:
    """Size of one saved file."""
    precision, full = options.output.save_precision, options.precision.full_fp16 or options.precision.full_bf16
    half = precision in ("fp16", "bf16") or (precision is None and full)
    return network_numbers(options) * (2 if half else 4)


def state_bytes(options: TrainNetworkOptions) -> int:
    """Size of one saved state: the weights, the optimizer's numbers for each, and the average."""
    spec = spec_named(optimizer_name(options.optimizer))
    moments = spec.moments * spec.moment_bits // 8
    return network_numbers(options) * (4 + moments + (4 if options.validation.ema_decay else 0))


def estimated_bytes(options: TrainNetworkOptions, batch: int, size: tuple[int, int]) -> int:
    """What is fixed, and the activations of a batch of so many pictures of this size (width, height)."""
    positions = batch * math.prod(size) // 64 * (1 if is_half(options) else 2) * WORKSPACE
    fixed, training = fixed_bytes(options), options.training
    needed = fixed + positions * (KEPT_WITH_CHECKPOINTING if training.gradient_checkpointing else KEPT)
    if training.gradient_checkpointing and training.gradient_checkpointing_budget:
        needed = max(needed, min(fixed + positions * KEPT, training.gradient_checkpointing_budget * 2**30))
    return int(needed)


def fixed_bytes(options: TrainNetworkOptions) -> float:
    """Frozen model, and the LoRA with gradients and two moments."""
    return CUDA_CONTEXT + frozen_bytes(options) + network_numbers(options) * 16


def frozen_bytes(options: TrainNetworkOptions) -> float:
    """The frozen model, packed as the options say."""
    numbers, v2 = frozen_numbers(options), options.model.v2
    saved = sum(
        PACKED_NUMBERS[part][v2] / FROZEN_NUMBERS[v2] * (number_bytes(options) - FORMATS[name].bits / 8)
        for part, name in base_formats(options).items() if name
    )  # fmt: skip
    return numbers * (number_bytes(options) - saved)


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
    """Number and size (width, height) of the pictures of the batch that has most pixels."""
    batches = [(dataset.table.configs[bucket.dataset].batch_size, bucket.size) for bucket in dataset.table.buckets]
    return max(batches, key=lambda batch: batch[0] * batch[1][0] * batch[1][1])


def frozen_numbers(options: TrainNetworkOptions) -> int:
    """Parameters of the model: by the size of its file, which most often holds 16-bit numbers, if that is smaller than usual."""
    path, usual = Path(options.model.pretrained_model_name_or_path or ""), FROZEN_NUMBERS[options.model.v2]
    return min(usual, path.stat().st_size // 2) if path.is_file() else usual
