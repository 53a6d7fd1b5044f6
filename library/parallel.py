"""Work in threads: results in order, with a bounded number of items in progress; one result for later."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_THREADS = 8  # for matrices; more would only wait for memory


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Generator[Result, None, None]:
    """work(item) for each item, in order; up to `count` items are submitted before the caller asks for them.

    The calling thread iterates over `items`. If the caller stops early, or `work` raises, waiting tasks are cancelled.
    """
    submitted: deque[Future[Result]] = deque()
    try:
        for item in items:
            submitted.append(pool.submit(work, item))
            if len(submitted) > count:
                yield submitted.popleft().result()
        while submitted:
            yield submitted.popleft().result()
    finally:
        for task in submitted:
            task.cancel()


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """Call `work` in a thread. A process that ends does not wait for it, as it would for the threads of an executor."""
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def on_matrices(items: Iterable[Item], work: Callable[[Item], Result], device: str = "cpu") -> Iterator[Result]:
    """work(item) for each item, in order: for work on many small matrices, one in each thread.

    Threads inside one small decomposition cost more than they save, and torch releases the GIL while it calculates. For another
    device than the CPU one thread is enough.
    """
    import torch

    threads = min(MAX_THREADS, os.cpu_count() or 1) if device == "cpu" else 1
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1 if threads > 1 else before,)) as pool:
        try:
            yield from ahead(pool, work, items, threads)
        finally:
            torch.set_num_threads(before)
