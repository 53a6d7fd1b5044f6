"""How the OpenMP threads that share torch's work on the CPU wait for each other."""

from __future__ import annotations

import os
import sys

QUIET_SPINS, BUSY_SPINS = 20_000, 1_000
SAMPLE_SECONDS, BUSY_FROM = 0.1, 0.5  # cores


def let_waiting_threads_sleep() -> None:
    """Let a waiting thread sleep sooner than by default, and much sooner on a busy machine. Call it before torch is imported.

    A thread of GNU OpenMP spins 300,000 times before it sleeps. If another program uses one of two cores, the spinning thread
    keeps the other core from the thread that it waits for: full-size steps took 3.4 times as long. With 20,000 spins they take
    2.5 times as long, and on a quiet machine no longer than before; with 1,000 spins 1.6 times, and 1.15 times on a quiet machine
    (benchmarks/results/busy_machine.md). The number cannot be changed later and does not change results. Values that the user has
    set are kept.
    """
    if sys.platform.startswith("linux") and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(BUSY_SPINS if busy_cores() > BUSY_FROM else QUIET_SPINS)


def machine_was_busy() -> bool:
    """Whether `let_waiting_threads_sleep` found other programs busy."""
    return os.environ.get("GOMP_SPINCOUNT") == str(BUSY_SPINS)


def busy_cores() -> float:
    """Cores that other programs use now. 0 if a run has several processes: they start together and would count each other."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        return 0.0
    import psutil

    return psutil.cpu_percent(SAMPLE_SECONDS) / 100 * (os.cpu_count() or 1)
