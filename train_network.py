"""Train a LoRA (or any other network module) for Stable Diffusion. `python train_network.py --help` lists the options."""

from __future__ import annotations

import sys

from library.errors import run_entry


def main() -> int:
    """Read the options, then import what training needs: --help and a misspelt option answer at once."""
    from library.training.options import parse_options

    options = parse_options(sys.argv[1:])
    if options.logs.output_config:
        from library.training.config_output import write_config

        print(f"the options are in {write_config(options, options.logs.config_file)}")
        return 0

    from library.training.run import train

    return train(options)


if __name__ == "__main__":
    run_entry(main)
