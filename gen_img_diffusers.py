"""Make images with Stable Diffusion and any number of networks. `python gen_img_diffusers.py --help` lists the options."""

from __future__ import annotations

from library.entry import run_entry
from library.generation.program import main

if __name__ == "__main__":
    run_entry(main)
