"""Train a LoRA (or any other network module) for Stable Diffusion. `python train_network.py --help` lists the options."""

from __future__ import annotations

from library.entry import run_entry
from library.training.program import main

if __name__ == "__main__":
    run_entry(main)
