"""One run of gen_img_diffusers.py: read the prompts, load the model, draw, save, print a summary."""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image
from tqdm import tqdm

from library.errors import UserError, counted
from library.files import write_new
from library.generation.interactive import ask_for_prompts, show
from library.generation.options import GenerateOptions
from library.generation.outputs.comparison import Comparison, columns_of
from library.generation.outputs.file_names import FileNames
from library.generation.outputs.image_writer import ImageWriter
from library.generation.outputs.png_text import RunFacts, loras_with_hashes, run_facts, text_fields
from library.generation.outputs.sheet_page import write_sheet_page
from library.generation.prompts.sources import read_prompts
from library.generation.prompts.written import WrittenPrompt
from library.generation.request_builder import Request, RequestBuilder
from library.imports import garbage_collection_paused

if TYPE_CHECKING:
    from library.generation.pipeline.pipeline import Failed, GeneratedImage

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
HISTORY = ".prompt_history"


def run(options: GenerateOptions) -> int:
    """Make the images that the options ask for. Returns the exit code: 0; 1 if something failed; 130 after Ctrl-C."""
    builder = RequestBuilder(options)
    requests = builder.build(read_prompts(options.prompts, builder.sources))
    if builder.problems and not requests and not options.prompts.interactive:
        first, *others = builder.problems.values()
        more = f" (and {counted(len(others), 'more wrong line')})" if others else ""
        raise UserError(f"{first}{more}; nothing is left to draw")
    _check_folder(Path(options.output.outdir))
    Session.report(*[f"skipped: {problem}" for problem in builder.problems.values()], *builder.notes)
    builder.notes.clear()
    return Session(options, builder).run(requests)


class Session:
    """The state of a run: what is saved, what failed, how long it takes."""

    def __init__(self, options: GenerateOptions, builder: RequestBuilder) -> None:
        with garbage_collection_paused():
            from library.generation.loading import load_pipeline  # imports torch, so only after all checks without a model

        self.options, self.builder = options, builder
        self.folder = Path(options.output.outdir)
        self.pipeline = load_pipeline(options)
        self.writer = ImageWriter()
        self.names = FileNames(
            self.folder, sequential=options.output.sequential_file_name, original=options.output.use_original_file_name,
            stages=self.pipeline.settings.highres is not None,
        )  # fmt: skip
        # Hashing gigabytes takes seconds, which the first image takes too.
        thread = ThreadPoolExecutor(1, "hashing")
        self.facts: Future[RunFacts] = thread.submit(run_facts, options, self.pipeline)
        thread.shutdown(wait=False)
        network = options.network
        columns = columns_of(network.network_weights or [], network.network_mul or [], options.output.sheet_strengths)
        self.comparison = Comparison(columns) if options.output.sheet else None
        self.finished = self.failed = self.wanted = 0
        self.skipped = len(builder.problems)
        self.seconds = 0.0
        self.interrupted = False

    @staticmethod
    def report(*lines: str) -> None:
        """Write lines to stderr, above the progress bar."""
        for line in lines:
            tqdm.write(line, file=sys.stderr)

    def run(self, requests: list[Request]) -> int:
        """Draw, save and sum up."""
        with self.writer:
            try:
                self.draw(requests)
                if self.options.prompts.interactive:
                    self.run_interactive()
            except KeyboardInterrupt:
                self.interrupted = True
            sheet = self.write_sheet()
        if sheet is not None:
            self.write_sheet_page(sheet.with_suffix(".html"))  # with the names of the files, which are all there now
        self.sum_up(sheet)
        if self.interrupted:
            return 130
        return 1 if self.failed or self.skipped else 0

    def draw(self, requests: list[Request]) -> list[Image]:
        """Make the images and hand each to the writer as it is finished. In an interactive run they are returned too."""
        specs = [request.spec for request in requests]
        if self.comparison is not None:
            specs = self.comparison.specs(specs)
        self.wanted += len(specs)
        drawn: list[Image] = []
        numbers: dict[int, int] = {}  # by index; in the name of an image's file, for both of its stages
        done_before, started = self.finished + self.failed, time.perf_counter()

        def fail(failed: Failed) -> None:
            self.failed += 1
            self.report(_failure(requests[failed.index % len(requests)].where, failed.error))

        try:
            with tqdm(total=len(specs), unit="image", desc="drawing", smoothing=0.1, bar_format=BAR, disable=not specs) as bar:
                for generated in self.pipeline.generate(specs, progress=partial(_advance, bar), on_error=fail):
                    if generated.index not in numbers:
                        numbers[generated.index] = self.names.take_number()
                    self._save(generated, requests[generated.index % len(requests)], numbers[generated.index])
                    drawn += [generated.image] if generated.stage and self.options.prompts.interactive else []
                    _catch_up(bar, self.finished + self.failed - done_before)
        finally:
            self.seconds += time.perf_counter() - started
        return drawn

    def _save(self, generated: GeneratedImage, request: Request, number: int) -> None:
        """Hand an image to the writer. It counts as finished with its final stage."""
        spec, highres, networks = generated.spec, self.pipeline.settings.highres, self.pipeline.settings.networks
        stage = generated.stage if highres is not None else None
        first_size = highres.first_size(*generated.full_size) if highres is not None else None
        used = networks.used(spec) if networks is not None else []

        def text() -> dict[str, str]:
            return text_fields(spec, request.written.text, self.facts.result(), loras_with_hashes(used), stage, first_size)

        names = self.names.candidates(number, generated.stage, spec.seed, spec.image)

        def then(path: Path) -> None:
            if self.options.prompts.interactive:
                self.report(str(path))
            if self.comparison is not None and generated.stage:
                self.comparison.files[generated.index] = path

        self.writer.add(generated.image, names, text, then)
        if generated.stage:
            self.finished += 1
            if self.comparison is not None:
                self.comparison.add(generated.index, generated.image)

    def run_interactive(self) -> None:
        """Ask for prompts until there are no more, and draw each; what is wrong with one is reported."""
        self.builder.problems.clear()  # those of --from_file or --prompt are reported
        for number, line in enumerate(ask_for_prompts(self.folder / HISTORY), start=1):
            requests = self.builder.build([WrittenPrompt(line, f"prompt {number}")])
            self.report(*self.builder.problems.values(), *self.builder.notes)
            self.builder.problems.clear()
            self.builder.notes.clear()
            drawn = self.draw(requests)
            self.writer.wait()
            if not self.options.prompts.no_preview:
                for image in drawn:
                    show(image)

    def write_sheet(self) -> Path | None:
        """The contact sheet of everything that was drawn."""
        if self.comparison is None or not len(self.comparison):
            return None
        first = self.comparison.rows[0]
        title = f"{Path(self.pipeline.model.name).stem}: {first.sampler}, {counted(first.steps, 'step')}, scale {first.scale:g}"
        sheet = self.comparison.draw(title)
        stem = f"sheet_{time.strftime('%Y%m%d%H%M%S')}"
        names = (self.folder / f"{stem}{'' if not copy else f'_{copy}'}.png" for copy in range(1000))
        return write_new(names, sheet.save)

    def write_sheet_page(self, path: Path) -> None:
        """The sheet as a page."""
        assert self.comparison is not None  # there is a sheet
        write_sheet_page(self.comparison, Path(self.pipeline.model.name).stem, path)

    def sum_up(self, sheet: Path | None) -> None:
        """Print the summary of the run."""
        speed = f" ({self.seconds:.1f} s, {self.seconds / self.finished:.2f} s an image)" if self.finished else ""
        begin = "interrupted: " if self.interrupted else ""
        print(f"{begin}{self.finished} of {counted(self.wanted, 'image')} saved in {self.folder}{speed}")
        if self.failed:
            print(f"{self.failed} failed; the reasons are above")
        if self.skipped:
            print(f"{counted(self.skipped, 'line')} of prompts skipped; the reasons are above")
        if sheet is not None:
            print(f"sheet: {sheet}\nas a page: {sheet.with_suffix('.html')}")


def _failure(where: str, error: UserError) -> str:
    """The line for an image that failed."""
    words = " ".join(str(error).split())
    return f"failed: {words if where in words else f'{where}: {words}'}"


def _advance(bar: tqdm, share: float) -> None:
    """Move the bar on, not past its end: sums of shares are not exact."""
    bar.update(min(share, bar.total - bar.n))


def _catch_up(bar: tqdm, done: int) -> None:
    """Move the bar on to `done` images: one that failed early had fewer steps."""
    if done > bar.n:
        bar.update(done - bar.n)


def _check_folder(folder: Path) -> None:
    """UserError if nothing can be written there, before the first image is drawn."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--outdir {folder}: cannot be written: {error.strerror or error}; give another folder") from error
