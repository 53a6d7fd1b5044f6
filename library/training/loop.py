"""The training loop, top to bottom: `Loop.run`. Whatever happens beside the steps is done by listeners."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from library.data.loader import EpochLoader
from library.errors import RunFailed, UserError, one_line
from library.processes import Processes
from library.training.interrupt import stop_on_interrupt
from library.training.outputs.saving import NotSaved
from library.training.plan import Plan, Progress
from library.training.run_state.state import State
from library.training.step import TrainStep
from library.training.update import StepReport

if TYPE_CHECKING:
    from library.training.setup import Run

LESS_MEMORY = (
    "use --gradient_checkpointing, --cache_latents, --network_train_unet_only, a smaller batch or --optimizer_type=AdamW8bit"
)


class Stop(Enum):
    """Why a run ends."""

    DONE = "all steps are done"
    EARLY = "a listener asked for it"  # --early_stopping_patience
    INTERRUPTED = "Ctrl-C"


class Listener:
    """Does something beside the steps of a run, such as logging, saving or drawing. Every method is optional.

    Listeners are called in their order, and at the end in reverse. In a run of several processes each has its own, and all are
    called at the same moments. What a listener raises ends the run, and what was trained is saved.
    """

    seconds = 0.0  # spent so far on what does not count in the seconds of a step

    def begin(self, run: Run) -> None:
        """Before the first step, with everything that the run is made of."""

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """After each step. progress: where the run goes on from here."""

    def after_epoch(self, progress: Progress, epoch: int) -> None:
        """After the last step of an epoch; progress is the beginning of the next one, unless the run ends within this one."""

    def at_end(self, progress: Progress, stop: Stop) -> None:
        """After the last step of the run."""

    def wants_to_stop(self) -> bool:
        """Whether the run ends here, although steps are left."""
        return False

    def state(self) -> State:
        """What must be saved, so that a resumed run goes on as if it had never stopped."""
        return State()

    def load_state(self, state: State) -> None:
        """Take what `state` gave from the state of the whole run."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    stop: Stop
    progress: Progress
    steps: int  # done by this run, without those before it was resumed
    seconds_per_step: float  # without what the listeners count apart

    @property
    def is_finished(self) -> bool:
        """Whether the trained network is what was asked for, and not a part of it."""
        return self.stop is not Stop.INTERRUPTED


@dataclass
class Loop:
    """Takes steps from `progress` on. rescue: saves what is trained when a run fails, and says where for the message."""

    plan: Plan
    step: TrainStep
    loader: EpochLoader
    listeners: Sequence[Listener]
    processes: Processes
    rescue: Callable[[Progress], str]
    progress: Progress

    def run(self) -> Outcome:
        """Train to the last step, a Ctrl-C, or until a listener wants to stop; the network is saved in each case."""
        self.processes.wait()
        started, first = time.perf_counter(), self.progress.step
        bar = tqdm(total=self.plan.max_steps, initial=first, unit="step", desc="training", smoothing=0.1)
        with stop_on_interrupt() as asked_to_stop, self._rescue(), bar:
            self.step.exchange.asked_to_stop = asked_to_stop
            stop = self._train(bar)
            self.step.exchange.finish()
            seconds_beside = sum(listener.seconds for listener in self.listeners)
            steps = self.progress.step - first
            outcome = Outcome(stop, self.progress, steps, (time.perf_counter() - started - seconds_beside) / max(1, steps))
            if not self.progress.step:
                raise RunFailed("stopped before the first step was done; nothing was saved")
            for listener in reversed(self.listeners):
                listener.at_end(self.progress, stop)
        return outcome

    def _train(self, bar: tqdm) -> Stop:
        """The steps. Returns why there are no more."""
        stop = self._stop()
        while self.progress.epoch <= self.plan.epochs:
            epoch = self.progress.epoch
            self.step.start_epoch(epoch)
            is_used_up = self.progress.position == self.plan.micro_batches_per_epoch  # it was killed before its after_epoch
            if stop is None and not is_used_up:
                for micro_batches in self.loader.steps(epoch, self.progress.position, self.plan.accumulation):
                    report = self.step(self.progress, micro_batches)
                    self.progress = self.progress.after_step(self.plan)
                    bar.update()
                    bar.set_postfix(self.step.losses.shown(), refresh=False)
                    for listener in self.listeners:
                        listener.after_step(self.progress, report)
                    stop = self._stop()
                    if stop is not None:
                        break
            if stop in (Stop.EARLY, Stop.INTERRUPTED):
                break
            self.progress = self.progress.after_epoch(self.plan)
            for listener in self.listeners:
                listener.after_epoch(self.progress, epoch)
            stop = self._stop()
            if stop is not None:
                break
        return Stop.DONE if stop is None or self.progress.step >= self.plan.max_steps else stop

    def _stop(self) -> Stop | None:
        """Whether the run ends now, alike in all processes."""
        if any(listener.wants_to_stop() for listener in self.listeners):
            return Stop.EARLY
        if self.step.exchange.stopping():
            return Stop.INTERRUPTED
        return Stop.DONE if self.progress.step >= self.plan.max_steps else None

    @contextmanager
    def _rescue(self) -> Iterator[None]:
        """Save what was trained so far if an image cannot be read, memory runs out or anything else fails.

        All processes end together; the main one says why.
        """
        try:
            with self._failing_together():
                yield
        except NotSaved:  # its message says where the weights are
            raise
        except UserError as error:
            error.args = (f"{error}{self.rescue(self.progress)}",)
            raise
        except (OSError, SafetensorError, UnicodeError) as error:  # a full disk, say
            raise RunFailed(f"{one_line(error)}{self.rescue(self.progress)}") from error
        except Exception:
            tqdm.write(self.rescue(self.progress).removeprefix("; "))
            raise

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if error is not self.processes.announced:
                self.step.exchange.fail()
            full = isinstance(error, torch.OutOfMemoryError)
            self.processes.announce(RunFailed(f"the GPU's memory is full; {LESS_MEMORY}") if full else error)
