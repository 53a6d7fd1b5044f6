"""The processes of one run: exchange of values, and errors that end all processes with one line.

Every exchange is the same collective, `_gather`, and carries either a value or an error. A process that fails alone can
therefore announce its error at any time: the others get it in their next exchange, whichever that is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from library.errors import RunFailed, UserError, UserErrors, one_line

T = TypeVar("T")

# One process may index or cache for hours while the others wait; a process that dies is noticed at once anyway.
DEFAULT_TIMEOUT_MINUTES = 180


@dataclass(frozen=True)
class Outcome:
    """What one process sends in an exchange: a value, or the error that ended it."""

    value: Any = None
    error: str = ""
    exit_code: int = 0


class EndedElsewhere(UserError):
    """Another process of this run shows an error; this one ends without a message, with the same `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Processes:
    """This process among the `world` of a run. Alone (world 1) everything here is immediate and uses no network."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0)) if together else 0
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", self.world)) if together else 1
        self.main = self.rank == 0
        self.broken = False
        self.announced: BaseException | None = None  # the error that all processes have
        self.before_exchange: Callable[[], None] = lambda: None  # raises if another process failed in a step

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of their ranks. An error of one process is raised in all."""
        if self.world == 1:
            return [value]
        self.before_exchange()
        return [outcome.value for outcome in self._gather(Outcome(value))]

    def wait(self) -> None:
        """Wait until all processes call this."""
        self.gather(None)

    def together(self, work: Callable[[], T]) -> T:
        """Call `work` in every process; an error in one is raised in all."""
        if self.world == 1:
            return work()
        result = self._announcing(work)
        self.gather(None)
        return result

    def on_main(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process; all processes get its result, or its error."""
        if self.world == 1:
            return work()
        result = self._announcing(work) if self.main else None
        self.gather(None)
        box: list[Any] = [result]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items of this process: every world-th."""
        return items[self.rank :: self.world]

    def same_weights(self, module: torch.nn.Module) -> None:
        """Copy the main process's parameters and buffers to all processes."""
        if self.world > 1:
            self.wait()  # raises an error of another process, which would else look like tensors of other shapes
            for tensor in module.state_dict().values():
                dist.broadcast(tensor.data, src=0)

    def announce(self, error: BaseException) -> NoReturn:
        """Send an error to the other processes and raise it: itself in the process that shows it, else EndedElsewhere."""
        if self.world == 1 or error is self.announced:
            raise error
        if isinstance(error, EndedElsewhere):  # another process sends the error itself
            self._gather(Outcome())
        known = isinstance(error, UserError)
        text = "\n".join(getattr(error, "problems", [str(error)])) if known else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, UserError) else 1
        self._gather(Outcome(error=text if self.main else f"process {self.rank}: {text}", exit_code=code), own=error)
        raise AssertionError("an announced error is always raised")

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """An error of one process in the block is raised in all; without an error all leave the block together."""
        try:
            yield
        except Exception as error:
            self.announce(error)
        else:
            self.wait()

    def _announcing(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:
            self.announce(error)

    def _gather(self, outcome: Outcome, own: BaseException | None = None) -> list[Outcome]:
        box = [Outcome()] * self.world
        try:
            dist.all_gather_object(box, outcome)
        except RuntimeError as error:  # gloo and NCCL: the connection to another process is gone
            self.broken = True
            raise own or lost_process(error) from error
        errors = [other for other in box if other.exit_code]
        if errors:
            self._raise_first(errors, own)
        return box

    def _raise_first(self, errors: list[Outcome], own: BaseException | None) -> NoReturn:
        """Raises the error in the main process, and any error but UserError in its own process; else EndedElsewhere."""
        first = errors[0]
        error: Any
        if own is not None and not isinstance(own, UserError):
            error = own
        elif self.main:
            error = UserErrors(first.error.split("\n")) if first.exit_code == 2 else RunFailed(first.error)
        else:
            error = EndedElsewhere(first.error, first.exit_code)
        self.announced = error  # `announce` must not send it again
        raise error

    def close(self) -> None:
        """Wait for all processes, then leave the group: the launcher kills the others when one process ends early."""
        if self.world > 1 and dist.is_initialized():
            if not self.broken:
                with suppress(RuntimeError):  # the others are gone already
                    dist.barrier()
            dist.destroy_process_group()


def lost_process(error: BaseException) -> RunFailed:
    """The error of a process that lost the connection to another one."""
    reason = one_line(error, 120)
    return RunFailed(f"another process of this run ended ({reason}); its error, if it printed one, is above")


def launched_world() -> int:
    """The number of processes, by the launcher's variable WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", 1))


def timeout(minutes: int | None) -> timedelta:
    """How long a process waits for the others, from --ddp_timeout."""
    return timedelta(minutes=minutes or DEFAULT_TIMEOUT_MINUTES)
