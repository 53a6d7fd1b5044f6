"""How the threads of OpenMP, which share torch's work on the CPU, wait for each other."""

from __future__ import annotations

import os
import sys

QUIET_SPINS, BUSY_SPINS = 20_000, 1_000
SAMPLE_SECONDS, BUSY_FROM = 0.1, 0.5  # cores


def let_waiting_threads_sleep() -> None:
    """Let a waiting thread sleep sooner than it does by itself, and much sooner on a busy machine. Before torch is imported.

    A thread of GNU OpenMP turns 300,000 times before it sleeps. Where another program has one of two cores, it keeps the other
    from the thread that it waits for: full-size steps took 3.4 times as long. With 20,000 turns they take 2.5 times, and on a
    quiet machine no longer than before; with 1,000 turns 1.6 times, and 1.15 on a quiet machine
    (benchmarks/results/busy_machine.md). The number cannot be changed later, and it changes no result. What the user has set
    stays.
    """
    if sys.platform.startswith("linux") and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(BUSY_SPINS if busy_cores() > BUSY_FROM else QUIET_SPINS)


def machine_was_busy() -> bool:
    """Whether other programs were busy when this one began."""
    return os.environ.get("GOMP_SPINCOUNT") == str(BUSY_SPINS)


def busy_cores() -> float:
    """Cores that other programs use now; 0 where several processes of one run start together, which would count each other."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        return 0.0
    import psutil

    return psutil.cpu_percent(SAMPLE_SECONDS) / 100 * (os.cpu_count() or 1)
