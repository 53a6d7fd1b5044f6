"""Split a DyLoRA file into one LoRA for each rank. `python networks/extract_lora_from_dylora.py --help` lists the options.

A rank's LoRA is the first rows and columns of the factors, at the scale that they had in training (see networks/dylora.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the repository, not this folder, is where modules are looked for
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.entry import run_tool
from library.errors import counted
from library.tools import lora_options
from library.tools.command import Parser, path_text


def options() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--model", type=path_text, required=True, help="DyLoRA file")
    parser.add_argument(
        "--save_to",
        type=path_text,
        required=True,
        help="files to write; the rank is added: split.safetensors gives split-0004.safetensors",
    )
    parser.add_argument("--unit", type=int, help="step from rank to rank (default: what the file says it was trained with)")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = options().parse_args(words)

    from tqdm import tqdm

    from library.formats.lora_file import read_loras, write_lora
    from library.tools.dylora_ranks import ranks_of, split_lora, unit_of
    from library.tools.lora_metadata import changed_metadata

    source = Path(args.model)
    (lora,) = read_loras([args.model])
    ranks = ranks_of(lora, unit_of(lora, args.unit))
    base = Path(args.save_to)
    targets = [lora_options.output_path(base.with_name(f"{base.stem}-{rank:04}{base.suffix}"), [source]) for rank in ranks]
    for rank, target in zip(tqdm(ranks, unit="file", desc="splitting"), targets, strict=True):
        modules = split_lora(lora, rank)
        metadata = changed_metadata(lora, modules, f"split from DyLoRA, rank {ranks[-1]} to {rank}")
        write_lora(target, modules, metadata, lora.dtype)
    print(f"saved {counted(len(targets), 'file')}, {targets[0]} to {targets[-1]}")


if __name__ == "__main__":
    run_tool(main)
