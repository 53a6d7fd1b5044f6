"""The machine of a run: its processes, and the device on which each of them trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from library.devices import cpu_has_fast_bf16, use_all_cores
from library.errors import counted
from library.freed_memory import keep_freed_memory
from library.openmp import machine_was_busy
from library.processes import Processes, launched_world, timeout
from library.training.memory.precision import HalfGradScaler
from library.training.options import PrecisionOptions, TrainingOptions


@dataclass(frozen=True)
class Machine:
    """accelerator: of this process. processes: of the run."""

    accelerator: Accelerator
    processes: Processes

    @classmethod
    def of(cls, options: TrainingOptions) -> Machine:
        """Connects the processes, if there are several. Without a GPU they talk through gloo."""
        accelerator = Accelerator(
            cpu=launched_world() > 1 and not torch.cuda.is_available(),  # else accelerate runs them side by side, each alone
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout(options.ddp_timeout))],
            mixed_precision=options.mixed_precision,
        )
        return cls(accelerator, Processes())

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.accelerator.device

    @property
    def autocast(self) -> Callable[[], AbstractContextManager]:
        """Makes the context in which a run computes with its --mixed_precision."""
        return self.accelerator.autocast


def set_up_machine(machine: Machine, training: TrainingOptions, precision: PrecisionOptions) -> None:
    """Memory, threads and loss scaler."""
    if precision.full_fp16:
        machine.accelerator.scaler = HalfGradScaler(machine.device.type)
    if machine.device.type == "cpu":
        keep_freed_memory()
        beside = " (other programs are busy too: steps take longer)" if machine_was_busy() else ""
        print(f"no GPU: training on the CPU, {counted(use_all_cores(), 'thread')}{beside}")
        if training.mixed_precision == "bf16" and not cpu_has_fast_bf16():
            print("this processor has no bf16 units: --mixed_precision no is many times faster here")
