"""Make images with SDXL: gen_img_diffusers.py under the name that SDXL commands call. `--help` lists the options."""

from __future__ import annotations

from library.entry import run_entry
from library.generation.program import main

if __name__ == "__main__":
    run_entry(main)
