"""Capabilities of the machine: device, precision, threads, memory."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import torch

from library.errors import UserError
from library.formats.precision import PRECISIONS, dtype_of

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

DTYPES = {"no": torch.float32, **{precision: dtype_of(precision) for precision in PRECISIONS}}


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """Raises UserError for a half precision that the device does not support."""
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU and none was found; use --mixed_precision bf16 or no")
    if mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--mixed_precision bf16 is not supported by this GPU; use --mixed_precision fp16")


def cpu_has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware; without it, bf16 is many times slower than float32."""
    query = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if query is None:
        return True
    return bool(query() or torch.cpu._is_amx_tile_supported())


def use_xformers(unet: UNet2DConditionModel, device: torch.device) -> None:
    """Use xformers' attention if it is installed and there is a GPU; torch's own is as exact and nearly as fast."""
    try:
        import xformers.ops  # noqa: F401

        if device.type != "cuda":
            raise ImportError("it needs an NVIDIA GPU")
    except ImportError as error:
        print(f"--xformers: {error}; using torch's attention instead")
        return
    unet.enable_xformers_memory_efficient_attention()


def cores_for_this_process() -> int:
    """CPU cores that this process may use: those of the machine (or container), shared among the run's processes on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def use_all_cores() -> int:
    """Let a CPU run under `accelerate launch` use every core; returns the number of threads.

    `--num_cpu_threads_per_process 1`, which guides recommend, is meant for GPU runs; on a CPU it would leave all cores but one
    idle. Without accelerate's launcher, OMP_NUM_THREADS keeps its meaning.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(cores_for_this_process())
    return torch.get_num_threads()


def available_memory(device: torch.device) -> tuple[int, str]:
    """The total memory of the GPU, or the free memory of the machine, in bytes; and a phrase that names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, "the GPU's"
    import psutil

    return psutil.virtual_memory().available, "this machine's free"


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory of this process: on the GPU if there is one, else resident; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
