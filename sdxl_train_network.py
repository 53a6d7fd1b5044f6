"""Train a LoRA for SDXL: train_network.py under the name that SDXL commands call. `--help` lists the options."""

from __future__ import annotations

from functools import partial

from library.entry import run_entry
from library.training.program import main

if __name__ == "__main__":
    run_entry(partial(main, family="sdxl"))
