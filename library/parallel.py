"""Work in threads, in order, with a bounded number of items under way."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST_THREADS = 8  # for matrices; more would only wait for memory


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Generator[Result, None, None]:
    """work(item) for each item, in order, with at most `count` of them begun before they are asked for.

    `items` is read by the calling thread. If the caller stops early, or `work` raises, what has not begun is cancelled.
    """
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > count:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for task in begun:
            task.cancel()


def on_matrices(items: Iterable[Item], work: Callable[[Item], Result], device: str = "cpu") -> Iterator[Result]:
    """work(item) of every item, in order: work on many small matrices, one to a thread.

    Threads inside of one small decomposition cost more than they save; torch lets other Python threads go on while it calculates.
    On another device than the CPU one thread keeps it busy.
    """
    import torch

    threads = min(MOST_THREADS, os.cpu_count() or 1) if device == "cpu" else 1
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1 if threads > 1 else before,)) as pool:
        try:
            yield from ahead(pool, work, items, threads)
        finally:
            torch.set_num_threads(before)
