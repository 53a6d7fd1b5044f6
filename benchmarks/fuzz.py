"""Thousands of odd inputs for every program: none may end in a traceback, lose something without a word, or leave half a file.

    python benchmarks/fuzz.py [--seed 1] [--share 1.0] [--kinds image caption ...] [--only image:17]

Images, captions, metadata files, dataset files, training configs, command lines of all programs, prompts, LoRA files,
checkpoints, full disks and paths, each made from (seed, kind, number), so that --only makes one again and prints all of it. The
programs run in this process through the code that ends their scripts. A training stops where the model would load, and
drawing where it would be loaded, but for one input in TRAINED_ONE_IN and the kinds in WRITING, which go on to their files.
Writes benchmarks/results/fuzz.md. About a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

from benchmarks.fuzzing import data, options, paths, weights  # noqa: E402
from benchmarks.fuzzing.case import Case  # noqa: E402
from benchmarks.fuzzing.full_disk import full_disk  # noqa: E402
from benchmarks.fuzzing.outcomes import Outcome, Reached, half_written  # noqa: E402
from benchmarks.fuzzing.shelf import Shelf, make_shelf  # noqa: E402

# kind -> (how an input is made, how many of them)
KINDS: dict[str, tuple[Callable[[random.Random, Path, Shelf], Case], int]] = {
    "image": (data.image, 1200),
    "caption": (data.caption, 700),
    "metadata file": (data.metadata_file, 500),
    "dataset file": (data.dataset_config, 700),
    "training config": (options.training_config, 700),
    "training command line": (options.training_words, 900),
    "drawing command line": (options.drawing_words, 500),
    "prompts": (options.prompt_file, 500),
    "tool command line": (options.tool_words, 500),
    "quickstart command line": (options.quickstart_words, 50),
    "LoRA file": (weights.lora_file, 600),
    "checkpoint": (weights.checkpoint, 300),
    "full disk": (full_disk, 150),
    "path": (paths.path, 200),
}
TRAINED_ONE_IN = 25
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.md"


@dataclass
class Row:
    """What became of the inputs of one kind."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shelf = make_shelf(Path(folder) / "shelf")
        if args.only:
            kind, number = args.only.rsplit(":", 1)
            show(kind, int(number), args.seed, Path(folder) / "case", shelf)
            return 0
        rows = run(args.seed, args.share, args.kinds or list(KINDS), Path(folder), shelf)
    text = report(rows, args.seed)
    print(text)
    if args.share == 1.0 and not args.kinds:
        RESULTS.write_text(text, encoding="utf-8", newline="\n")
    return min(sum(len(row.faults) for row in rows.values()), 100)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs of each kind")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), help="default: all")
    parser.add_argument("--only", help="one input, as kind:number: what it is and what is printed")
    return parser.parse_args()


def run(seed: int, share: float, kinds: list[str], folder: Path, shelf: Shelf, progress: bool = True) -> dict[str, Row]:
    """All inputs of the kinds. Raises ValueError if a program changed one of the good files."""
    before = shelf.digests()
    rows = {}
    for kind in kinds:
        rows[kind] = row = Row()
        started = time.perf_counter()
        for number in range(max(1, round(KINDS[kind][1] * share))):
            case, outcome, half = run_one(kind, number, seed, folder / "case", shelf)
            note(row, f"{kind}:{number}", case, outcome, half)
        row.seconds = time.perf_counter() - started
        if progress:
            print(f"{kind}: {dict(row.counts)}, {row.seconds:.0f} s", *row.faults[:20], sep="\n  ", file=sys.stderr, flush=True)
        if shelf.digests() != before:
            raise ValueError(f"one of the files of {shelf.folder} was changed by an input of kind {kind}")
    return rows


def run_one(kind: str, number: int, seed: int, folder: Path, shelf: Shelf) -> tuple[Case, Outcome, list[str]]:
    """Make one input in an empty folder, run its program, and look for files that are not whole."""
    shutil.rmtree(folder, ignore_errors=True)
    inner = folder / "outer" / "here"  # ../x stays within
    inner.mkdir(parents=True)
    case = KINDS[kind][0](random.Random(f"{seed}/{kind}/{number}"), inner, shelf)
    inputs = {path: path.stat().st_mtime_ns for path in inner.rglob("*") if path.is_file()}
    goes_on = number % TRAINED_ONE_IN == 0 or kind in WRITING
    with contextlib.nullcontext() if goes_on else without_slow_work(kind):
        outcome = case.run()
    AcceleratorState._reset_state(reset_partial_state=True)
    for path, changed in inputs.items():
        if path.exists() and path.stat().st_mtime_ns == changed:
            path.unlink()  # what is left was written by the program
    return case, outcome, half_written(folder)


@contextlib.contextmanager
def without_slow_work(kind: str) -> Iterator[None]:
    """Trainings and drawings end where the model would load; what reads weights goes on to the drawing itself."""

    def reached(*_: object, **__: object) -> None:
        raise Reached

    names = ["library.training.entry.prepare"]
    names.append(
        "library.generation.pipeline.pipeline.Pipeline.generate"
        if kind in WEIGHTS
        else "library.generation.loading.load_pipeline"
    )
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(name, reached))
        yield


WEIGHTS = ("LoRA file", "checkpoint")
WRITING = ("full disk", "path")  # of which all inputs go on to the files


def note(row: Row, name: str, case: Case, outcome: Outcome, half: list[str]) -> None:
    """Count one outcome, and keep what is a fault."""
    row.counts["inputs"] += 1
    lost = case.silent_loss(outcome)
    if outcome.traceback:
        row.counts["traceback"] += 1
        row.faults.append(f"{name}: {outcome.traceback.strip().splitlines()[-1][:200]}")
    elif outcome.ended_well:
        row.counts["well"] += 1
    elif outcome.is_refused:
        row.counts["refused"] += 1
    elif outcome.is_failed:
        row.counts["failed"] += 1
    else:
        row.counts["otherwise"] += 1
        row.faults.append(f"{name}: exit code {outcome.code}, {outcome.error_lines} error lines")
    if case.must_end_well and not outcome.ended_well and not outcome.traceback:
        row.counts["good"] += 1
        row.faults.append(f"{name}: a good input ended with exit code {outcome.code}")
    if lost:
        row.counts["lost"] += 1
        row.faults.append(f"{name}: {lost}")
    if half:
        row.counts["half"] += 1
        row.faults.append(f"{name}: half written: {half}")


def show(kind: str, number: int, seed: int, folder: Path, shelf: Shelf) -> None:
    case, outcome, half = run_one(kind, number, seed, folder, shelf)
    print("words:", *map(ascii, case.words), "", outcome.text, outcome.traceback, f"exit code {outcome.code}", sep="\n")
    print("lost:", case.silent_loss(outcome), "half written:", half)


COLUMNS = {
    "inputs": "inputs", "well": "ended well", "refused": "refused in one line, exit code 2",
    "failed": "failed in one line, exit code 1", "otherwise": "ended otherwise", "traceback": "traceback",
    "good": "good, yet refused", "lost": "silent loss", "half": "half-written files",
}  # fmt: skip


def report(rows: dict[str, Row], seed: int) -> str:
    """The table and the faults as Markdown."""
    total: Counter[str] = sum((row.counts for row in rows.values()), Counter())
    lines = [
        "# Odd inputs", "",
        f"`python benchmarks/fuzz.py --seed {seed}`, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()}; {sum(row.seconds for row in rows.values()):.0f} s.", "",
        f"| kind | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|",
    ]  # fmt: skip
    for kind, counts in [*((kind, row.counts) for kind, row in rows.items()), ("all", total)]:
        lines.append(f"| {kind} | {' | '.join(f'{counts[column]:,}' for column in COLUMNS)} |")
    faults = [fault for row in rows.values() for fault in row.faults]
    lines += ["", *(f"- {fault}" for fault in faults)] if faults else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
