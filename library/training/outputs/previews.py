"""Sample images while training, as --sample_prompts and --sample_every_n_* ask for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tqdm import tqdm

from library.data.images import own_mark
from library.errors import counted, one_line
from library.files import atomic_write
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.spec import PromptSpec
from library.models.family import Model
from library.models.modules import evaluating
from library.network_modules import AdapterNetwork
from library.training.loop import Listener
from library.training.machine import Machine
from library.training.options import OutputOptions, PreviewOptions
from library.training.outputs.sample_grid import write_sample_grid
from library.training.outputs.trackers import Tracker
from library.training.plan import Progress
from library.training.run_state.state import State
from library.training.update import StepReport

if TYPE_CHECKING:
    from library.training.setup import Run


class PreviewDrawer:
    """Draws prompts with the model as it is now. The processes share the images.

    eval_weights: within it the network holds the weights that are saved.
    """

    def __init__(
        self, model: Model, network: AdapterNetwork, machine: Machine, settings: GenerateSettings,
        eval_weights: Callable[[], AbstractContextManager],
    ) -> None:  # fmt: skip
        self.model, self.network, self.machine = model, network, machine
        self.settings, self.eval_weights = settings, eval_weights

    def draw(self, specs: Sequence[PromptSpec]) -> dict[int, Image.Image | str]:
        """The images of all processes by the number of the prompt; in place of one that failed, the reason."""
        drawn: dict[int, Image.Image | str] = {}
        for part in self.machine.processes.gather(self._own_share(specs)):
            drawn |= part
        return dict(sorted(drawn.items()))

    def _own_share(self, specs: Sequence[PromptSpec]) -> dict[int, Image.Image | str]:
        drawn: dict[int, Image.Image | str] = {}
        pipeline = Pipeline(self.model, self.settings)  # a new one each time: it keeps encoded texts, and the weights change
        with self._models_on_device(), self.eval_weights(), evaluating(self.network):
            for number, spec in self.machine.processes.share(list(enumerate(specs))):
                try:
                    drawn[number] = next(pipeline.generate([spec])).image
                except Exception as error:  # whatever it was, hours of training must not be lost for an image
                    drawn[number] = one_line(error)
        return drawn

    @contextmanager
    def _models_on_device(self) -> Iterator[None]:
        """Text encoder and VAE may be on the CPU while training; bring them to the device for the images and back."""
        parts = (*self.model.text_encoders, self.model.vae)
        before = [next(part.parameters()).device for part in parts]
        for part in parts:
            part.to(self.machine.device)
        try:
            yield
        finally:
            for part, device in zip(parts, before, strict=True):
                part.to(device)


class Previews(Listener):
    """Draws --sample_prompts into `<output_dir>/sample` when they are due. An image that fails never ends the run.

    writes: whether this process writes files; in a run of several only the main one does.
    """

    def __init__(
        self, options: PreviewOptions, output: OutputOptions, specs: list[PromptSpec], drawer: PreviewDrawer, tracker: Tracker,
        writes: bool = True,
    ) -> None:  # fmt: skip
        self.options, self.output, self.specs = options, output, specs
        self.drawer, self.tracker, self.writes = drawer, tracker, writes
        self.folder = output.folder / "sample"
        self.drawn: list[tuple[int, str, int]] = []  # (step, moment as in the file's name, number of the prompt)

    def begin(self, run: Run) -> None:
        """Before the first step, if --sample_at_first."""
        if self.options.sample_at_first and not run.loop.progress.step:
            self.draw("e000000", step=0)

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """After every --sample_every_n_steps steps; --sample_every_n_epochs wins over it."""
        interval = self.options.sample_every_n_steps
        if interval and progress.step % interval == 0 and not self.options.sample_every_n_epochs:
            self.draw(f"{progress.step:06d}", progress.step)

    def after_epoch(self, progress: Progress, epoch: int) -> None:
        """At the end of every --sample_every_n_epochs epochs."""
        interval = self.options.sample_every_n_epochs
        if interval and epoch % interval == 0:
            self.draw(f"e{epoch:06d}", progress.step)

    def state(self) -> State:
        """Which images there are."""
        return State(record={"samples": self.drawn})

    def load_state(self, state: State) -> None:
        """Put back what `state` gave; states of older versions have none."""
        self.drawn = [(step, moment, number) for step, moment, number in state.record.get("samples", [])]

    def draw(self, moment: str, step: int) -> None:
        """Draw all prompts; `moment` becomes part of the files' names. The processes share the work."""
        started = time.perf_counter()
        images = {}
        for number, result in self.drawer.draw(self.specs).items():
            if isinstance(result, str) or (problem := self._write(result, moment, number)):
                tqdm.write(f"sample {number} failed: {result if isinstance(result, str) else problem}")
            else:
                images[f"sample_{number}"] = result
                self.drawn.append((step, moment, number))
        self.tracker.log_images(step, images)
        self._write_grid()
        seconds = time.perf_counter() - started
        self.seconds += seconds
        tqdm.write(f"{counted(len(images), 'sample image')} in {self.folder} ({seconds:.0f} s)")

    def _write(self, image: Image.Image, moment: str, number: int) -> str | None:
        """Save an image; what went wrong, if anything."""
        if not self.writes:
            return None
        try:
            with atomic_write(self._path(moment, number, self.specs[number])) as temporary:
                image.save(temporary, pnginfo=own_mark("sample"))
        except Exception as error:
            return one_line(error)
        return None

    def _write_grid(self) -> None:
        """All images of the run so far on one sheet next to the LoRA."""
        if not self.writes:
            return
        path = self.output.folder / f"{self.output.file_stem}-samples.png"
        try:
            write_sample_grid(self.folder, self.output.output_name, [spec.prompt for spec in self.specs], path)
        except Exception as error:
            tqdm.write(f"{path} was not drawn: {one_line(error)}")

    def _path(self, moment: str, number: int, spec: PromptSpec) -> Path:
        """`{output_name_}{moment}_{number}_{time}{_seed}.png`."""
        name = self.output.output_name
        seed = "" if spec.seed is None else f"_{spec.seed}"
        return self.folder / f"{name + '_' if name else ''}{moment}_{number:02d}_{time.strftime('%Y%m%d%H%M%S')}{seed}.png"
