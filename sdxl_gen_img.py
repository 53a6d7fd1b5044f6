"""Make images with SDXL: gen_img_diffusers.py under the name that SDXL commands call. `--help` lists the options."""

from __future__ import annotations

from gen_img_diffusers import main
from library.errors import run_entry

if __name__ == "__main__":
    run_entry(main)
