"""The program that makes images, which stands under one name for all families and under another for SDXL commands."""

from __future__ import annotations

import sys

from library.openmp import let_waiting_threads_sleep


def main() -> int:
    """Read the options and prompts, then import what drawing needs: --help and a misspelt option answer at once."""
    from library.generation.options import parse_options

    options = parse_options(sys.argv[1:])
    let_waiting_threads_sleep()

    from library.generation.session import run

    return run(options)
