"""library/parallel.py: work in a thread whose result is wanted later."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from library.parallel import in_background

ROOT = Path(__file__).resolve().parents[2]


def test_the_result_or_the_error_comes_when_it_is_asked_for():
    assert in_background(lambda: 7).result(60) == 7
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0).result(60)


def test_a_process_that_ends_does_not_wait_for_it():
    code = "import time; from library.parallel import in_background; in_background(lambda: time.sleep(600))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
