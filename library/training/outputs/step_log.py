"""Loss and learning rates of every step, to the trackers and the plot."""

from __future__ import annotations

from library.training.loop import Listener, Stop
from library.training.outputs.trackers import Tracker
from library.training.outputs.tracking import LossRecord
from library.training.plan import Progress
from library.training.run_state.state import State
from library.training.update import StepReport


class StepLog(Listener):
    """Logs each step under its own number, one step late: by then its losses have arrived and nothing waits for them."""

    def __init__(self, losses: LossRecord, tracker: Tracker) -> None:
        self.losses, self.tracker = losses, tracker
        self._waiting: list[tuple[int, StepReport]] = []  # steps that are not logged yet

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """Log the step before this one."""
        self.losses.add_rates(progress.step, report.rates)
        self._log_waiting()
        self._waiting.append((progress.step, report))

    def after_epoch(self, progress: Progress, epoch: int) -> None:
        """Log the epoch's mean loss; all losses of it are waited for."""
        self.losses.flush()
        self._log_waiting()
        self.tracker.log_epoch(epoch, self.losses)

    def at_end(self, progress: Progress, stop: Stop) -> None:
        """Log the last step."""
        self._log_waiting()

    def state(self) -> State:
        """All losses and rates. Steps that wait are logged first, since a resumed run does not repeat them."""
        self.losses.flush()
        self._log_waiting()
        tensors, record = self.losses.state()
        return State(record={"losses": record}, tensors={"losses": tensors})

    def load_state(self, state: State) -> None:
        """Put back what `state` gave."""
        self.losses.load_state(state.tensors["losses"], state.record["losses"])

    def _log_waiting(self) -> None:
        for step, report in self._waiting:
            self.tracker.log_step(step, report.rates, report.found_rates, self.losses.take(step))
        self._waiting.clear()
