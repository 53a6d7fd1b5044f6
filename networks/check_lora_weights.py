"""Show what is in a LoRA file. `python networks/check_lora_weights.py --help` lists the options.

A table of modules with rank, alpha and norms, sums by block, the metadata, and which program made the file. Exit code 0 also
for a file with NaN or infinity: those are shown.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the repository, not this folder, is where modules are looked for
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.entry import run_tool
from library.tools.command import Parser, path_text


def options() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("file", type=path_text, help="LoRA file")
    parser.add_argument("--show_all_keys", "-s", action="store_true", help="also list every tensor with its shape and dtype")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = options().parse_args(words)

    from library.formats.lora_file import read_lora
    from library.formats.tensor_file import open_tensors
    from library.tools.lora_report import report, tensors

    for line in report(read_lora(args.file)):
        print(line)
    if args.show_all_keys:
        with open_tensors(Path(args.file)) as file:
            print()
            for line in tensors(file):
                print(line)


if __name__ == "__main__":
    run_tool(main)
