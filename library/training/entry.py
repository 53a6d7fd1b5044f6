"""One training run from its options to its files: checks, set-up, the loop, the last screen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext

from library.console import KeptWarnings, keeping_warnings
from library.data.dataset_page import write_dataset_page
from library.data.debug import write_debug_sheet
from library.devices import available_memory
from library.imports import import_model_libraries
from library.processes import EndedElsewhere, Processes
from library.training.checks.preflight import check_images, preflight
from library.training.loop import Listener
from library.training.machine import Machine, set_up_machine
from library.training.memory.precision import NumberFormats
from library.training.options import TrainNetworkOptions
from library.training.outputs.summary import summarize
from library.training.setup import begin_reading, prepare


def train(
    options: TrainNetworkOptions, listeners: Sequence[Listener] = (), family: str | None = None,
    model_facts: Future[dict[str, str]] | None = None,
) -> int:  # fmt: skip
    """Train as the options say. Returns the exit code: 0, or 130 after Ctrl-C.

    Of several processes all end with the same code, and only rank 0 prints. listeners: called after those of the run itself.
    family: the one family of models to accept, by its name. model_facts: `all_model_facts`, if a thread looks for them already.
    """
    machine = Machine.of(options.training)
    processes = machine.processes
    try:
        with processes.ending_together(), keeping_warnings() as warnings:
            return train_here(options, machine, warnings, listeners, family, model_facts)
    except EndedElsewhere as error:
        return error.exit_code
    except KeyboardInterrupt:  # no time to wait for the others
        processes.broken = True
        raise
    finally:
        processes.close()


def train_here(
    options: TrainNetworkOptions, machine: Machine, warnings: KeptWarnings, listeners: Sequence[Listener] = (),
    family: str | None = None, model_facts: Future[dict[str, str]] | None = None,
) -> int:  # fmt: skip
    """Train as one of the processes of a run."""
    processes = machine.processes
    set_up_machine(machine, options.training, options.precision)
    if options.data.debug_dataset:
        return show_images(options, processes)
    memory = available_memory(machine.device)  # before the model fills it
    reading = begin_reading(options.model, NumberFormats.of(options.training, options.precision), machine.device)
    with reading or nullcontext():
        import_model_libraries()  # the checks need them, and would import some with garbage collections, 0.6 s longer
        ready = processes.on_main(lambda: preflight(options, machine.device, processes.world, family, memory))
        print(ready.dataset.bucket_table())
        run = prepare(ready, machine, listeners, warnings, model_facts, reading)
    started = time.perf_counter()
    outcome = run.train()
    seconds = time.perf_counter() - started
    skipped = sum(processes.gather(run.step.skipped))
    processes.on_main(lambda: summarize(run, outcome, seconds, skipped))
    return 0 if outcome.is_finished else 130


def show_images(options: TrainNetworkOptions, processes: Processes) -> int:
    """--debug_dataset: write a sheet and a page of the images as they would be trained on. No model is needed."""
    dataset = processes.on_main(lambda: check_images(options))
    print(dataset.bucket_table())
    sheet = processes.on_main(lambda: write_debug_sheet(dataset, options.output.folder))
    page = options.output.folder / "debug_dataset.html"
    processes.on_main(lambda: write_dataset_page(dataset, page))
    print(f"the first batches are in {sheet}, all images in {page}")
    return 0
