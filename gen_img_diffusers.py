"""Make pictures with Stable Diffusion and any number of networks. `python gen_img_diffusers.py --help` lists the options."""

from __future__ import annotations

import sys

from library.errors import run_entry


def main() -> int:
    """Read the options and prompts, then import what drawing needs: --help and a misspelt option answer at once."""
    from library.generation.options import parse_options

    options = parse_options(sys.argv[1:])

    from library.generation.session import run

    return run(options)


if __name__ == "__main__":
    run_entry(main)
