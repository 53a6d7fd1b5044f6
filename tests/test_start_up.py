"""Options are read before anything large is imported: --help and a wrong option answer at once (see benchmarks/start_up.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *(ROOT / "networks").glob("*.py"), *(ROOT / "tools").glob("*.py")]
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
)
LARGE = {"torch", "numpy", "cv2", "PIL", "diffusers", "transformers", "accelerate", "tqdm", "matplotlib"}


def test_the_entries_are_all_there():
    assert {"train_network.py", "gen_img_diffusers.py", "networks/merge_lora.py", "tools/doctor.py", "quickstart.py"} <= {
        *ENTRIES
    }


@pytest.mark.parametrize("option, code, entry", [
    *(("--help", 0, entry) for entry in ENTRIES),
    # Further options of quickstart.py go to the demo, after the set-up.
    *(("--no_such_option", 2, entry) for entry in ENTRIES if entry != "quickstart.py"),
])  # fmt: skip
def test_options_are_read_before_large_imports(option, code, entry):
    words = [sys.executable, "-X", "importtime", str(ROOT / entry), option]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"})
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == code, said
    assert "argparse" in imported or entry == "quickstart.py"  # else nothing was looked at
    assert not imported & LARGE
    assert not any("Traceback" in line for line in said)
    assert ("[options]" in done.stdout or "usage:" in done.stdout) if code == 0 else any(option in line for line in said), said
