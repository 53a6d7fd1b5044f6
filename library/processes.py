"""The processes of one run: what they tell each other, and how an error in one of them ends them all with one line.

Every exchange here is one and the same collective, `_gather`, and carries either a value or an error. A process that fails
alone can therefore announce it at any time: the others meet the error at their next exchange, whichever that is.
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

# Indexing and caching may keep one process busy for long while the others wait; a process that dies is noticed at once anyway.
DEFAULT_TIMEOUT_MINUTES = 180


@dataclass(frozen=True)
class Told:
    """What one process says in an exchange: a value, or the error that ended it."""

    value: Any = None
    error: str = ""
    exit_code: int = 0


class EndedElsewhere(UserError):
    """Another process of this run has an error to show; this one only ends. `exit_code` is that of the other."""

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
        self.before_exchange: Callable[[], None] = lambda: None  # raises if another process failed within a step

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of their ranks. Raises on all what was raised on one."""
        if self.world == 1:
            return [value]
        self.before_exchange()
        return [told.value for told in self._gather(Told(value))]

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)

    def together(self, work: Callable[[], T]) -> T:
        """Each process does `work`; an error in one is raised in all."""
        if self.world == 1:
            return work()
        result = self._announcing(work)
        self.gather(None)
        return result

    def on_main(self, work: Callable[[], T]) -> T:
        """The main process does `work`, all get its result (or its error)."""
        if self.world == 1:
            return work()
        result = self._announcing(work) if self.main else None
        self.gather(None)
        box: list[Any] = [result]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the items: every world-th."""
        return items[self.rank :: self.world]

    def same_weights(self, module: torch.nn.Module) -> None:
        """Give all processes the main one's parameters and buffers."""
        if self.world > 1:
            self.wait()  # an error elsewhere shows here, and not as tensors of other shapes
            for tensor in module.state_dict().values():
                dist.broadcast(tensor.data, src=0)

    def announce(self, error: BaseException) -> NoReturn:
        """Tell the others of an error here, and end. The error itself comes back on the process that shows it."""
        if self.world == 1 or getattr(error, "told", False):
            raise error
        if isinstance(error, EndedElsewhere):  # the others tell more
            self._gather(Told())
        known = isinstance(error, UserError)
        text = "\n".join(getattr(error, "problems", [str(error)])) if known else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, UserError) else 1
        self._gather(Told(error=text if self.main else f"process {self.rank}: {text}", exit_code=code), own=error)
        raise AssertionError("an announced error is always raised")

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """An error in the block on one process ends it on all; without one, all leave it together."""
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

    def _gather(self, told: Told, own: BaseException | None = None) -> list[Told]:
        box = [Told()] * self.world
        try:
            dist.all_gather_object(box, told)
        except RuntimeError as error:  # gloo and NCCL: the connection to another process is gone
            self.broken = True
            raise own or lost_process(error) from error
        errors = [other for other in box if other.exit_code]
        if errors:
            self._raise_first(errors, own)
        return box

    def _raise_first(self, errors: list[Told], own: BaseException | None) -> NoReturn:
        """The main process shows the error, with a traceback if it is its own and no UserError; the others end silently."""
        first = errors[0]
        error: Any
        if own is not None and not isinstance(own, UserError):
            error = own
        elif self.main:
            error = UserErrors(first.error.split("\n")) if first.exit_code == 2 else RunFailed(first.error)
        else:
            error = EndedElsewhere(first.error, first.exit_code)
        error.told = True  # all know: it must not be announced again on its way up
        raise error

    def close(self) -> None:
        """Leave together, when all are done: an early leaver would make the launcher kill the others."""
        if self.world > 1 and dist.is_initialized():
            if not self.broken:
                with suppress(RuntimeError):  # the others are gone already
                    dist.barrier()
            dist.destroy_process_group()


def lost_process(error: BaseException) -> RunFailed:
    """The error of a process whose partner vanished without a word."""
    reason = one_line(error, 120)
    return RunFailed(f"another process of this run ended without a word ({reason}); its own message, if it had one, stands above")


def launched_world() -> int:
    """How many processes the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def timeout(minutes: int | None) -> timedelta:
    """How long a process waits for the others, from --ddp_timeout."""
    return timedelta(minutes=minutes or DEFAULT_TIMEOUT_MINUTES)
