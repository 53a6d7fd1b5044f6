"""How long every script and tool takes to answer: `--help`, a wrong option, and the import of the trainer.

    python benchmarks/start_up.py                        this checkout
    python benchmarks/start_up.py --before OTHER_CHECKOUT    and another one, in turns, in one sitting

Each figure is the least of several starts, with files in the system's cache: seconds from start to end of the process, and of
the processor, which a busy machine changes less. The slowest modules come from `python -X importtime`.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.3  # seconds for --help and for a wrong option
WRONG = "--no_such_option"
SCRIPTS = ("train_network.py", "gen_img_diffusers.py")


def entries(root: Path) -> list[str]:
    """Every script and tool. quickstart.py is left out: it needs the standard library alone, and older ones begin to set up."""
    files = [*(root / name for name in SCRIPTS), *(root / "networks").glob("*.py"), *(root / "tools").glob("*.py")]
    return sorted(
        file.relative_to(root).as_posix() for file in files if 'if __name__ == "__main__"' in file.read_text(encoding="utf-8")
    )


def seconds(root: Path, words: list[str], repeats: int) -> tuple[float, float]:
    """(start to end, processor) of `python WORDS`: the least of so many starts."""
    return min(_once(root, words) for _ in range(repeats))


def _once(root: Path, words: list[str]) -> tuple[float, float]:
    before, started = os.times(), perf_counter()
    subprocess.run([sys.executable, *words], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    elapsed, after = perf_counter() - started, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return elapsed, used


def slowest_modules(root: Path, words: list[str], count: int = 8) -> list[tuple[str, float]]:
    """The modules whose own code, without what they import, takes longest: (name, seconds)."""
    done = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=root, capture_output=True, text=True)
    lines = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", done.stderr, re.MULTILINE)
    return sorted(((name, int(own) / 1e6) for own, name in lines), key=lambda pair: -pair[1])[:count]


def trainer_import(root: Path) -> list[str]:
    """The words after `python` that import what a training run needs before its first step."""
    entry = "library.training.entry" if (root / "library/training/entry.py").exists() else "library.training.run"
    return ["-c", f"import {entry}"]


def rows(roots: list[Path], repeats: int) -> list[tuple[str, list[tuple[float, float]]]]:
    """(what was started, its times in each checkout)."""
    found = []
    for entry in entries(roots[-1]):
        for option in ("--help", WRONG):
            found.append((f"`{entry} {option}`", [seconds(root, [entry, option], repeats) for root in roots]))
            print(*_row(*found[-1]), sep="", flush=True)
    found.append(("import of the trainer", [seconds(root, trainer_import(root), repeats) for root in roots]))
    print(*_row(*found[-1]), sep="", flush=True)
    return found


def _row(name: str, times: list[tuple[float, float]]) -> list[str]:
    return [f"| {name} |", *(f" {elapsed:.2f} | {used:.2f} |" for elapsed, used in times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--before", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--repeats", type=int, default=5, help="starts of which the quickest counts (default 5)")
    args = parser.parse_args()
    roots = [*([args.before.resolve()] if args.before else []), ROOT]
    load = f"; load of the machine at the start {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores{load};")
    print(f"the least of {args.repeats} starts, seconds from start to end and of the processor.\n")
    names = ["before", "now"] if args.before else ["now"]
    print("| started |" + "".join(f" {name} | processor |" for name in names))
    print("|---|" + "---:|---:|" * len(names))
    found = rows(roots, args.repeats)
    late = [name for name, times in found[:-1] if times[-1][0] > GOAL]
    print(f"\nmore than {GOAL} s: {', '.join(late) or 'none'}\n")
    for title, words in (
        ("`train_network.py --help`", ["train_network.py", "--help"]),
        ("import of the trainer", trainer_import(ROOT)),
    ):
        print(f"slowest modules of {title}: " + ", ".join(f"{name} {own:.3f}" for name, own in slowest_modules(ROOT, words)))


if __name__ == "__main__":
    main()
