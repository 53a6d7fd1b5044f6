"""Make smaller copies of images in several resolutions, for training at more than one size.

`python tools/resize_images_to_resolution.py --max_resolution 512x512,384x384 --save_as_png --copy_associated_files src dst`

Each resolution W x H is a limit on the area: an image with more pixels is shrunk to it with its shape kept, a smaller one
stays as it is. `cat.jpg` becomes `cat+512x512.jpg`, and so on, beside a copy of the original. Subfolders are kept. All cores
work.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.entry import run_entry
from library.errors import RunFailed, UserError, counted
from library.tools.command import Parser, path_text

FILTERS = ("area", "cubic", "lanczos4", "linear", "nearest", "box")


def read_resolutions(text: str) -> tuple[tuple[int, int], ...]:
    """`512x512,384x384` as pairs of numbers."""
    pairs = [re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", part) for part in text.split(",")]
    sizes = tuple((int(pair[1]), int(pair[2])) for pair in pairs if pair)
    if len(sizes) < len(pairs) or not all(map(all, sizes)):
        raise UserError(f"--max_resolution {text}: give widths and heights as in 512x512,384x384")
    return sizes


def options() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("src_img_folder", type=path_text, help="folder of images; folders in it are used too")
    parser.add_argument("dst_img_folder", type=path_text, help="folder to write to; it is made if it is not there")
    resolutions = "512x512,384x384,256x256,128x128"
    parser.add_argument("--max_resolution", default=resolutions, help="sizes, with commas; only the area of each counts")
    parser.add_argument("--divisible_by", type=int, default=1, help="cut both sides to multiples of this, from the middle")
    parser.add_argument("--interpolation", choices=FILTERS, default="area", help="how to shrink")
    parser.add_argument("--save_as_png", action="store_true", help="write PNG, with transparency, instead of JPEG of quality 100")
    parser.add_argument("--copy_associated_files", action="store_true", help="copy cat.txt to cat+512x512.txt, and so on")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = options().parse_args(words)
    source, target = Path(args.src_img_folder), Path(args.dst_img_folder)
    if not source.is_dir():
        raise UserError(f"there is no folder {source}")
    if target.exists() and (not target.is_dir() or os.path.samefile(source, target)):
        raise UserError(f"{target} is {'the source folder' if target.is_dir() else 'a file'}; give another folder to write to")
    if args.divisible_by < 1:
        raise UserError(f"--divisible_by {args.divisible_by}: must be at least 1")
    sizes = read_resolutions(args.max_resolution)

    from library.data.smaller_copies import Settings, resize_folder

    settings = Settings(sizes, args.divisible_by, args.interpolation, args.save_as_png, args.copy_associated_files)
    if bad := resize_folder(source, target, settings):
        for line in bad:
            print(f"not resized: {line}", file=sys.stderr)
        raise RunFailed(f"{counted(len(bad), 'image')} could not be used (named above); the others are in {target}")
    print(f"saved to {target}")


if __name__ == "__main__":
    run_entry(main)
