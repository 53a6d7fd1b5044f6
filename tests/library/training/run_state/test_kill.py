"""`kill -9` at random moments, also while saving: the last whole state resumes, and the end is the same bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed processes are forked, which Windows cannot do")
def test_killed_at_25_random_moments_and_resumed(tmp_path):
    result = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_resume.py"), "--kills", "26", "--out", str(result)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["kills_in_all"] >= 25 and found["rounds_that_ended_bit_for_bit"] >= 1
    assert found["kills_that_left_a_half_written_state"] >= 1, "none fell into saving"
