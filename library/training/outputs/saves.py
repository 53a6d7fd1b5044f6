"""When the network's files and the states of the run are written; how is in saving.py and run_state/state.py."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from library.errors import UserError
from library.network_modules import AdapterNetwork
from library.processes import Processes
from library.training.loop import Listener, Stop
from library.training.outputs.metadata import RunMetadata
from library.training.outputs.saving import ModelFiles, NotSaved
from library.training.outputs.tracking import LossRecord
from library.training.plan import Plan, Progress
from library.training.run_state.snapshot import Snapshot
from library.training.run_state.state import StateFiles
from library.training.update import StepReport


class SavedWeights(Listener):
    """Saves the network as --save_every_n_steps and --save_every_n_epochs ask for, and at the end."""

    def __init__(
        self,
        files: ModelFiles,
        network: AdapterNetwork,
        metadata: RunMetadata,
        losses: LossRecord,
        plan: Plan,
        processes: Processes,
    ) -> None:
        self.files, self.network, self.metadata, self.losses = files, network, metadata, losses
        self.plan, self.processes = plan, processes
        self.every_n_steps = files.options.save_every_n_steps or 0
        self.every_n_epochs = files.epoch_interval(plan.epochs) or 0

    def save(self, path: Path, step: int, epochs: int) -> None:
        """Write a file, unless a loss until now was not finite. epochs: how many are done, for the metadata."""
        self.losses.flush()
        self.processes.on_main(lambda: self.files.save(path, self.network, self.metadata.at(step, epochs)))
        tqdm.write(f"saved {path}")

    def saves_after_step(self, step: int) -> bool:
        """Whether a file is written after this step."""
        return self.every_n_steps > 0 and step % self.every_n_steps == 0

    def saves_after_epoch(self, epoch: int) -> bool:
        """Whether a file is written after this epoch; after the last one it is the final file."""
        return self.every_n_epochs > 0 and epoch % self.every_n_epochs == 0 and epoch < self.plan.epochs

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """Save, and then remove the file that is too old."""
        if self.saves_after_step(progress.step):
            self.save(self.files.step_path(progress.step), progress.step, progress.whole_epochs)
            self.files.remove_old_step(progress.step, self.every_n_steps)

    def after_epoch(self, progress: Progress, epoch: int) -> None:
        """Save, and then remove the file that is too old."""
        if self.saves_after_epoch(epoch):
            self.save(self.files.epoch_path(epoch), progress.step, epoch)
            self.files.remove_old_epoch(epoch, self.every_n_epochs)

    def at_end(self, progress: Progress, stop: Stop) -> None:
        """Save the final file, or after a Ctrl-C one that is named for its step."""
        if stop is Stop.INTERRUPTED:
            self.save(self.files.step_path(progress.step), progress.step, progress.whole_epochs)
        else:
            self.save(self.files.final_path(), progress.step, self.plan.epochs)

    def rescue(self, progress: Progress) -> str:
        """Save the network of a run that failed, unless it holds a NaN, and say where; nothing if no step was done."""
        path = self.files.step_path(progress.step)
        if not progress.step or path in self.files.written:
            return ""
        try:
            self.files.save(path, self.network, self.metadata.at(progress.step, progress.whole_epochs))
        except NotSaved as error:
            return f"; {error}"
        except UserError:
            return ""
        return f"; what was trained until then is in {path}"


class SavedStates(Listener):
    """Saves the state of the run with every file (--save_state) and at the end (--save_state_on_train_end as well).

    It comes last among the listeners, so that a state includes what the others did after its step. At the end it is therefore the
    first, so that after a kill no file is newer than the state.
    """

    def __init__(self, states: StateFiles, snapshot: Snapshot, weights: SavedWeights, processes: Processes) -> None:
        self.states, self.snapshot, self.weights, self.processes = states, snapshot, weights, processes

    def save(self, folder: Path, progress: Progress) -> None:
        """Write a state."""
        state = self.snapshot.take(progress)
        self.processes.on_main(lambda: self.states.save(folder, state))
        tqdm.write(f"saved {folder}")

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """Save, and then remove the state that is too old."""
        if self.states.at_saves and self.weights.saves_after_step(progress.step):
            self.save(self.states.step_path(progress.step), progress)
            self.processes.on_main(lambda: self.states.remove_old_step(progress.step, self.weights.every_n_steps))

    def after_epoch(self, progress: Progress, epoch: int) -> None:
        """Save, and then remove the state that is too old."""
        if self.states.at_saves and self.weights.saves_after_epoch(epoch):
            self.save(self.states.epoch_path(epoch), progress)
            self.processes.on_main(lambda: self.states.remove_old_epoch(epoch, self.weights.every_n_epochs))

    def at_end(self, progress: Progress, stop: Stop) -> None:
        """Save the last state."""
        if self.states.at_end:
            interrupted = stop is Stop.INTERRUPTED
            self.save(self.states.step_path(progress.step) if interrupted else self.states.final_path(), progress)
