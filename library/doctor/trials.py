"""The trials of the self test for a machine, and the reasons against those that it cannot run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

COARSE = "as expected: 4 bits round the base coarsely"
CPU = "float32, CPU"  # the trial that the others are compared with


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that decide about trials. reasons: name of a finding -> why that does not work here."""

    device: str = "cpu"  # "cuda", "mps" or "cpu"
    gpus: int = 0
    bf16: bool = False  # in hardware
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One short training. reference: the trial that should have the same result; None for the first.

    arguments: of train_network.py. same_noise: whether it has the same random numbers as its reference; they depend on the device
    and on the number of devices. if_differs: why a difference is no fault. missing: why this machine cannot run it.
    """

    name: str
    arguments: tuple[str, ...] = ()
    reference: str | None = CPU
    same_noise: bool = True
    on_cpu: bool = False  # although there is a GPU
    processes: int = 1
    seconds: float = 75  # time limit
    if_differs: str = ""
    missing: str = ""


def this_machine(reasons: Mapping[str, str]) -> Machine:
    """The machine that this process runs on."""
    import torch

    from library.devices import cpu_has_fast_bf16

    if torch.cuda.is_available():
        return Machine("cuda", torch.cuda.device_count(), torch.cuda.is_bf16_supported(including_emulation=False), reasons)
    if torch.backends.mps.is_available():
        return Machine("mps", 1, True, reasons)
    return Machine("cpu", 0, cpu_has_fast_bf16(), reasons)


def trials(machine: Machine) -> Iterator[Trial]:
    """All trials, the most informative first, since time may run out. A reference comes before the trials compared with it."""
    gpu = {"cuda": "GPU", "mps": "Apple GPU"}.get(machine.device, "")
    here = f"float32, {gpu}" if gpu else CPU
    yield Trial(CPU, reference=None, on_cpu=True, seconds=150)  # the disk's cache is empty at first
    if gpu:
        yield Trial(here, same_noise=False)
    no_fp16 = "" if gpu else "fp16 needs a GPU"
    no_bf16 = "" if machine.bf16 else f"this {'GPU' if gpu else 'processor'} has no bf16 units"
    half = "bf16" if machine.bf16 else "fp16" if gpu else "no"
    eight_bit, xformers = machine.reasons.get("8-bit optimizers", ""), machine.reasons.get("xformers", "")
    compiler = machine.reasons.get("torch_compile", "")
    cuda, pair = ("" if machine.device == "cuda" else "it needs an NVIDIA GPU"), f"{machine.gpus or 'no'} GPU here"
    for name, arguments, missing in (
        ("bf16", ("--mixed_precision=bf16",), no_bf16),
        ("fp16", ("--mixed_precision=fp16",), no_fp16),
        (f"int8 base, {half}", ("--base_dtype=int8", f"--mixed_precision={half}"), ""),
        (f"fp8 base, {half}", ("--base_dtype=fp8", f"--mixed_precision={half}"), ""),
        (f"nf4 base, {half}", ("--base_dtype=nf4", f"--mixed_precision={half}"), ""),
        ("AdamW8bit", ("--optimizer_type=AdamW8bit",), eight_bit),
        ("gradient checkpointing", ("--gradient_checkpointing",), ""),
        ("xformers", ("--xformers",), xformers),
        ("full_bf16", ("--mixed_precision=bf16", "--full_bf16"), no_bf16),
        ("full_fp16", ("--mixed_precision=fp16", "--full_fp16", "--optimizer_args", "eps=1e-4"), no_fp16),
    ):
        yield Trial(name, arguments, here, if_differs=COARSE if "--base_dtype=nf4" in arguments else "", missing=missing)
    yield Trial("two GPUs", (), here, same_noise=False, processes=2, missing=cuda or (pair if machine.gpus < 2 else ""))
    yield Trial("torch_compile", ("--torch_compile",), here, seconds=150, missing=compiler)
    graphs = ("--torch_compile", "--dynamo_backend=cudagraphs")
    yield Trial("CUDA graphs", graphs, here, missing=cuda)
