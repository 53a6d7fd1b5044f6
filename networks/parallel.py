"""Work on many small matrices, one to a thread.

Threads inside of one small decomposition cost more than they save; torch lets other Python threads go on while it calculates.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST = 8  # more would only wait for memory


def in_parallel(items: Iterable[Item], work: Callable[[Item], Result], device: str = "cpu") -> Iterator[Result]:
    """work(item) of every item, in order. Only a few more items than there are threads are taken ahead, to save memory.

    `items` is read by the calling thread. On another device than the CPU one thread keeps it busy.
    """
    threads = min(MOST, os.cpu_count() or 1) if device == "cpu" else 1
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1 if threads > 1 else before,)) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for task in waiting:
                task.cancel()
            torch.set_num_threads(before)
