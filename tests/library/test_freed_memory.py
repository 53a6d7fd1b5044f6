from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from library.freed_memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    print("not here")
    raise SystemExit
for turn in range(25):
    if turn == 20:  # by then it has what it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.ones(16_000_000)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be set to keep freed memory")
def test_kept_memory_is_not_cleared_by_the_system_again():
    def faults(how):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, encoding="utf-8", check=True)
        return done.stdout.strip()

    kept = faults("keep")
    if kept == "not here":
        pytest.skip("this C library keeps no memory")
    assert int(kept) < 500  # pages; 5 turns touch 78,000
    assert int(faults("give back")) > 10_000
