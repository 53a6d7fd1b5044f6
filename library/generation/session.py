"""One run of gen_img_diffusers.py: read the prompts, load the model, draw, save, say what became of it."""

from __future__ import annotations

import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from library.errors import UserError
from library.files import write_new
from library.generation.album import Album
from library.generation.comparison import Comparison, columns_of
from library.generation.file_names import FileNames
from library.generation.interactive import ask_for_prompts, show
from library.generation.options import GenerateOptions
from library.generation.plan import Planner, Request
from library.generation.png_text import RunFacts, text_fields, with_hashes
from library.generation.prompt_sources import RawPrompt, read_prompts
from library.generation.prompts import PromptSpec
from library.imports import collector_resting

if TYPE_CHECKING:
    from library.generation.generator import Made
    from library.generation.studio import Studio

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
HISTORY = ".prompt_history"


@dataclass
class Task:
    """An image to draw: its spec, the request that it comes from and its place in the sheet, if there is one.

    number: in the name of its file, from its first stage on.
    """

    spec: PromptSpec
    request: Request
    cell: tuple[int, int] | None = None
    number: int | None = None


def run(options: GenerateOptions) -> int:
    """Make the images that the options ask for. Returns the exit code: 0; 1 if something failed; 130 after Ctrl-C."""
    planner = Planner(options)
    requests = planner.plan(read_prompts(options, planner.sources))
    if planner.problems and not requests and not options.prompts.interactive:
        first, *others = planner.problems.values()
        raise UserError(f"{first}{f' (and {len(others)} more wrong lines)' if others else ''}; nothing is left to draw")
    _check_folder(Path(options.output.outdir))
    Session.tell(*[f"skipped: {problem}" for problem in planner.problems.values()], *planner.notes)
    planner.notes.clear()
    return Session(options, planner).run(requests)


class Session:
    """The state of a run: what is saved, what failed, how long it takes."""

    def __init__(self, options: GenerateOptions, planner: Planner) -> None:
        with collector_resting():
            from library.generation.studio import Studio  # torch comes in here, after all that can be said without it

        self.options, self.planner = options, planner
        self.folder = Path(options.output.outdir)
        self.studio: Studio = Studio(options)
        self.album = Album()
        self.names = FileNames(
            self.folder, sequential=options.output.sequential_file_name, original=options.output.use_original_file_name,
            stages=self.studio.highres is not None,
        )  # fmt: skip
        # Hashing gigabytes takes seconds, which the first image takes too.
        thread = ThreadPoolExecutor(1, "hashing")
        self.facts: Future[RunFacts] = thread.submit(self.studio.facts)
        thread.shutdown(wait=False)
        network = options.network
        columns = columns_of(network.network_weights or [], network.network_mul or [], options.output.sheet_strengths)
        self.comparison = Comparison(columns) if options.output.sheet else None
        self.finished = self.failed = self.wanted = 0
        self.skipped = len(planner.problems)
        self.seconds = 0.0
        self.interrupted = False

    @staticmethod
    def tell(*lines: str) -> None:
        """Words beside the progress bar."""
        for line in lines:
            tqdm.write(line, file=sys.stderr)

    def run(self, requests: list[Request]) -> int:
        """Draw, save and sum up."""
        with self.album:
            try:
                self.draw(self.tasks(requests))
                if self.options.prompts.interactive:
                    self.converse()
            except KeyboardInterrupt:
                self.interrupted = True
            sheet = self.write_sheet()
        self.sum_up(sheet)
        if self.interrupted:
            return 130
        return 1 if self.failed or self.skipped else 0

    def tasks(self, requests: list[Request]) -> list[Task]:
        """The requests as images; one whose source image cannot be read has failed."""
        pairs = []
        for request in requests:
            try:
                pairs.append((self.studio.spec(request), request))
            except UserError as error:
                self.wanted += 1
                self.fail(request.where, error)
        if self.comparison is None:
            return [Task(spec, request) for spec, request in pairs]
        cells = self.comparison.plan([spec for spec, _ in pairs])
        return [Task(spec, pairs[cell[0]][1], cell) for cell, spec in cells]

    def draw(self, tasks: list[Task]) -> list[Made]:
        """Make the images and give each to the album as it is finished. In an interactive run they are returned too."""
        self.wanted += len(tasks)
        pending, drawn, started = deque(tasks), [], time.perf_counter()
        specs = [task.spec for task in tasks]
        try:
            with tqdm(total=len(tasks), unit="image", desc="drawing", smoothing=0.1, bar_format=BAR, disable=not tasks) as bar:
                for made in self.studio.draw(specs, partial(self._advance, bar), partial(self._failed, pending)):
                    drawn += self._keep(made, pending)
                    self._correct(bar, len(tasks) - len(pending))
        finally:
            self.seconds += time.perf_counter() - started
        return drawn

    def _keep(self, made: Made, pending: deque[Task]) -> list[Made]:
        """Hand an image to the album; it is done with when its final stage is there."""
        task = next(task for task in pending if task.spec == made.spec)
        spec, stage = made.spec, made.stage if self.studio.highres else None
        used, first_size = self.studio.used(spec), self.studio.first_size(spec)

        def text() -> dict[str, str]:
            return text_fields(spec, task.request.raw, self.facts.result(), with_hashes(used), stage, first_size)

        if task.number is None:
            task.number = self.names.take_number()
        names = self.names.candidates(task.number, made.stage, spec.seed, task.request.source)
        then = (lambda path: self.tell(str(path))) if self.options.prompts.interactive else None
        self.album.add(made.image, names, text, then)
        if made.stage == 0:
            return []
        pending.remove(task)
        self.finished += 1
        if self.comparison is not None:
            self.comparison.add(task.cell, made.image)
        return [made] if self.options.prompts.interactive else []

    def _failed(self, pending: deque[Task], spec: PromptSpec, error: UserError) -> None:
        task = next(task for task in pending if task.spec == spec)
        pending.remove(task)
        self.fail(task.request.where, error)

    def fail(self, where: str, error: UserError) -> None:
        """Count and name an image that failed."""
        self.failed += 1
        words = " ".join(str(error).split())
        self.tell(f"failed: {words if where in words else f'{where}: {words}'}")

    @staticmethod
    def _advance(bar: tqdm, share: float) -> None:
        """Sums of shares are not exact."""
        bar.update(min(share, bar.total - bar.n))

    @staticmethod
    def _correct(bar: tqdm, done: int) -> None:
        """The bar counts steps; an image that failed early has fewer of them."""
        if done > bar.n:
            bar.update(done - bar.n)

    def converse(self) -> None:
        """Ask for prompts until there are no more; a wrong one is named and asked for again."""
        self.planner.problems.clear()  # those of the list were told
        for number, line in enumerate(ask_for_prompts(self.folder / HISTORY), start=1):
            requests = self.planner.plan([RawPrompt(line, f"prompt {number}")])
            self.tell(*self.planner.problems.values(), *self.planner.notes)
            self.planner.problems.clear()
            self.planner.notes.clear()
            drawn = self.draw(self.tasks(requests))
            self.album.wait()
            if not self.options.prompts.no_preview:
                for made in drawn:
                    show(made.image)

    def write_sheet(self) -> Path | None:
        """The contact sheet of everything that was drawn."""
        if self.comparison is None or not len(self.comparison):
            return None
        first = self.comparison.rows[0]
        title = f"{Path(self.studio.model.name).stem}: {first.sampler}, {first.steps} steps, scale {first.scale:g}"
        sheet = self.comparison.draw(title)
        stem = f"sheet_{time.strftime('%Y%m%d%H%M%S')}"
        names = (self.folder / f"{stem}{'' if not copy else f'_{copy}'}.png" for copy in range(1000))
        return write_new(names, sheet.save)

    def sum_up(self, sheet: Path | None) -> None:
        """The last lines."""
        speed = f" ({self.seconds:.1f} s, {self.seconds / self.finished:.2f} s an image)" if self.finished else ""
        begin = "interrupted: " if self.interrupted else ""
        print(f"{begin}{self.finished} of {self.wanted} images saved in {self.folder}{speed}")
        if self.failed:
            print(f"{self.failed} failed; the reasons are above")
        if self.skipped:
            print(f"{self.skipped} line(s) of prompts skipped; the reasons are above")
        if sheet is not None:
            print(f"sheet: {sheet}")


def _check_folder(folder: Path) -> None:
    """Find out now, and not after the first image, that nothing can be written."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--outdir {folder}: cannot be written: {error.strerror or error}; give another folder") from error
