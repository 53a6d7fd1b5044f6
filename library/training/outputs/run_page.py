"""`<output_name>.html`: the run as a page for the browser, rewritten while training goes on. page_facts.py says what is on it.

A thread writes it, at most every few seconds and with less than a hundredth of the time; no step waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from library.console import KeptWarnings
from library.errors import one_line
from library.pages.page import folder_of, write_page
from library.processes import Processes
from library.training.loop import Listener, Stop
from library.training.options import OutputOptions
from library.training.outputs.page_facts import Moment, facts_at_start, facts_now
from library.training.outputs.page_samples import PageSamples
from library.training.plan import Progress
from library.training.run_state.state import State
from library.training.update import StepReport

if TYPE_CHECKING:
    from library.training.setup import Run

LEAST_SECONDS = 5.0  # between two writes
COST = 200  # a pause after a write, in times of the processor time that it took
ENDS = {Stop.DONE: "finished", Stop.EARLY: "early", Stop.INTERRUPTED: "interrupted"}


class RunPage(Listener):
    """Writes the page of a run, unless --no_report. A page that cannot be written is reported once and ends nothing.

    notes: what the checks before the run found; warnings: those that are still collected.
    """

    def __init__(self, options: OutputOptions, notes: Sequence[str], warnings: KeptWarnings | None, processes: Processes) -> None:
        self.path = options.folder / f"{options.file_stem}.html"
        self.is_written = processes.main and not options.no_report
        self.notes, self.warnings = notes, warnings
        self.saved: dict[str, int] = {}  # name of a file -> step after which it was saved
        self.datasets: list[tuple[int, int]] = []  # (step, dataset) of every batch, if there are several datasets
        self._stop: Stop | None = None
        self._seen_files: list[Path] = []
        self._reported = False
        self._due = 0.0
        self._has_several = False
        self._thread = ThreadPoolExecutor(1, "page")  # it starts with its first work
        self._writing: Future[None] | None = None

    @contextmanager
    def kept(self, run: Run) -> Iterator[None]:
        """Keep the page of a run from before its first step to after its last file, whatever ends it."""
        if not self.is_written:
            yield
            return
        self._open(run)
        try:
            yield
        except BaseException as error:
            self._close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", one_line(error))
            raise
        self._close(ENDS[self._stop or Stop.DONE])

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """Let the thread write the page if it is time and it is idle."""
        if not self.is_written:
            return
        if self._has_several:
            self._note_datasets(progress.step)
        self._note_files(progress.step)
        self._progress = progress
        if time.monotonic() >= self._due and (self._writing is None or self._writing.done()):
            self._writing = self._thread.submit(self._write, "running")

    def after_epoch(self, progress: Progress, epoch: int) -> None:
        """Note the files of the epoch."""
        if self.is_written:
            self._note_files(progress.step)
            self._progress = progress

    def at_end(self, progress: Progress, stop: Stop) -> None:
        """Note how the run ends; its last files are not written yet."""
        self._stop = stop

    def state(self) -> State:
        """What the page cannot find again."""
        tensors = {"page": {"datasets": torch.tensor(self.datasets, dtype=torch.int64)}} if self.datasets else {}
        return State(record={"saved": self.saved}, tensors=tensors)

    def load_state(self, state: State) -> None:
        """Put back what `state` gave; states of older versions have none."""
        self.saved = dict(state.record.get("saved", {}))
        if "page" in state.tensors:
            self.datasets = [tuple(pair) for pair in state.tensors["page"]["datasets"].tolist()]

    def _open(self, run: Run) -> None:
        self._run, self._progress = run, run.loop.progress
        self._start = Moment(time.time(), run.loop.progress.step)
        self._has_several = len(run.data.train.table.configs) > 1
        self._fixed: dict[str, Any] | None = None
        self._samples = PageSamples(run.previews, folder_of(self.path))
        self._write("running")  # here and not in the thread: loader processes must not be forked while it decodes images

    def _close(self, state: str, reason: str = "") -> None:
        self._progress = self._run.loop.progress
        self._note_files(self._progress.step)
        self._thread.shutdown()
        self._write(state, reason)

    def _write(self, state: str, reason: str = "") -> None:
        started = time.thread_time()
        try:
            folder = folder_of(self.path)
            folder.mkdir(parents=True, exist_ok=True)
            if self._fixed is None:
                self._fixed = facts_at_start(self._run, folder)
            facts = facts_now(self._run, self._progress, self._start, self.datasets)
            saved = {**self.saved}
            data = {
                **self._fixed, **facts, "state": state, "reason": reason, "written": round(time.time() * 1000),
                "every": LEAST_SECONDS, "warnings": [*self.notes, *(self.warnings.texts if self.warnings else ())],
                "samples": self._samples.facts(), "files": self._files(saved),
            }  # fmt: skip
            write_page(self.path, "run", self.path.stem, data)
        except Exception as error:  # a full disk, a folder that is gone: hours of training must not be lost for a page
            if not self._reported:
                self._reported = True
                tqdm.write(f"the page {self.path} was not written: {one_line(error)}")
        self._due = time.monotonic() + max(LEAST_SECONDS, COST * (time.thread_time() - started))

    def _note_datasets(self, step: int) -> None:
        """The datasets of the batches of this step: a batch has images of one."""
        before, plan, dataset = self._progress, self._run.plan, self._run.data.train
        order, first = dataset.epoch_order(before.epoch), plan.first_of_step(before.position)
        for position in range(first, first + plan.step_size(before.position)):
            bucket = dataset.table.bucket[order[position][0]]
            self.datasets.append((step, dataset.table.buckets[bucket].dataset))

    def _note_files(self, step: int) -> None:
        written = self._run.files.written
        if written is not self._seen_files:  # a new list after each file, with that file at its end
            for path in [*(path for path in written if path not in self._seen_files), *written[-1:]]:
                self.saved[path.name] = step
            self._seen_files = written

    def _files(self, saved: dict[str, int]) -> list[dict[str, Any]]:
        """Those that are there, the newest first."""
        best, files = self._run.validator.record.best, self._run.files
        if best is not None and files.best_path().name in saved:
            saved[files.best_path().name] = best[0]
        losses = dict(self._run.validator.record.history[:])
        rows = []
        for name, step in saved.items():
            path = files.folder / name
            if path.is_file():
                is_best = best is not None and step == best[0]
                rows.append({"name": name, "step": step, "bytes": path.stat().st_size, "loss": losses.get(step), "best": is_best})
        return sorted(rows, key=lambda row: (-row["step"], row["name"]))
