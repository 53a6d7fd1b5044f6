"""merge_lora.py under the name that commands for SDXL call: the family is read from the files."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: the repository, not this folder, is where modules are looked for
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.entry import run_tool
from library.tools.merge_program import main, options

__all__ = ["main", "options"]

if __name__ == "__main__":
    run_tool(main)
