"""One training run from its options to its files: checks, set-up, the loop, the last screen."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from library.console import KeptWarnings, keeping_warnings
from library.data.dataset_page import write_dataset_page
from library.data.debug import write_debug_sheet
from library.devices import cpu_has_fast_bf16, use_all_cores
from library.freed_memory import keep_freed_memory
from library.openmp import machine_was_busy
from library.processes import EndedElsewhere, Processes, launched_world, timeout
from library.training.checks.preflight import check_images, preflight
from library.training.loop import Listener
from library.training.memory.precision import HalfGradScaler
from library.training.options import TrainNetworkOptions
from library.training.outputs.summary import summarize
from library.training.setup import prepare


def train(options: TrainNetworkOptions, listeners: Sequence[Listener] = (), family: str | None = None) -> int:
    """Train as the options say. Returns the exit code: 0, or 130 after Ctrl-C.

    Of several processes all end with the same code, and only rank 0 prints. listeners: called after those of the run itself.
    family: the one family of models to accept, by its name.
    """
    accelerator = make_accelerator(options)
    processes = Processes()
    try:
        with processes.ending_together(), keeping_warnings() as warnings:
            return train_here(options, accelerator, processes, warnings, listeners, family)
    except EndedElsewhere as error:
        return error.exit_code
    except KeyboardInterrupt:  # no time to wait for the others
        processes.broken = True
        raise
    finally:
        processes.close()


def train_here(
    options: TrainNetworkOptions, accelerator: Accelerator, processes: Processes, warnings: KeptWarnings,
    listeners: Sequence[Listener] = (), family: str | None = None,
) -> int:  # fmt: skip
    """Train as one of the processes of a run."""
    set_up_machine(options, accelerator)
    if options.data.debug_dataset:
        return show_images(options, processes)
    ready = processes.on_main(lambda: preflight(options, accelerator.device, processes.world, family))
    options = ready.options
    print(ready.dataset.bucket_table())
    run = prepare(options, ready, accelerator, processes, listeners, warnings)
    started = time.perf_counter()
    outcome = run.train()
    seconds = time.perf_counter() - started
    skipped = sum(processes.gather(run.step.skipped))
    processes.on_main(lambda: summarize(run, outcome, seconds, skipped))
    return 0 if outcome.is_finished else 130


def show_images(options: TrainNetworkOptions, processes: Processes) -> int:
    """--debug_dataset: a sheet and a page with what would be trained on, without a model."""
    dataset = processes.on_main(lambda: check_images(options))
    print(dataset.bucket_table())
    sheet = processes.on_main(lambda: write_debug_sheet(dataset, options.output.folder))
    page = options.output.folder / "debug_dataset.html"
    processes.on_main(lambda: write_dataset_page(dataset, page))
    print(f"the first batches are in {sheet}, all images in {page}")
    return 0


def make_accelerator(options: TrainNetworkOptions) -> Accelerator:
    """The accelerator; with several processes it connects them. Without a GPU they talk through gloo."""
    return Accelerator(
        cpu=launched_world() > 1 and not torch.cuda.is_available(),  # else accelerate would run them side by side, each alone
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout(options.training.ddp_timeout))],
        mixed_precision=options.training.mixed_precision,
    )


def set_up_machine(options: TrainNetworkOptions, accelerator: Accelerator) -> None:
    """Memory, threads and loss scaler."""
    if options.precision.full_fp16:
        accelerator.scaler = HalfGradScaler(accelerator.device.type)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        beside = " (other programs are busy too: steps take longer)" if machine_was_busy() else ""
        print(f"no GPU: training on the CPU, {use_all_cores()} threads{beside}")
        if options.training.mixed_precision == "bf16" and not cpu_has_fast_bf16():
            print("this processor has no bf16 units: --mixed_precision no is many times faster here")
