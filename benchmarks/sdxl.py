"""Full-size SDXL with random weights: its names beside Diffusers' reading, opening it beside reading it, a step beside its floor.

    python benchmarks/sdxl.py [--parts open step names] [--size 512] [--precision bf16|no] [--cases unet ...] [--folder FOLDER]

names: a single file as it is written here, read by the functions of Diffusers that convert single files: names and shapes of
every tensor against those of Diffusers' own models. On tensors without content.
open: seconds and memory of `load_stable_diffusion` for the fp16 file of 6.9 GB beside plain reading, in processes of their own,
by turns, the file being in the system's cache.
step: a training step of a LoRA of rank 4 on the U-Net beside the bare U-Net of Diffusers, forward and backward to its input, as
in benchmarks/train_step.py: medians by turns in one process, peaks of two more.

The file needs 7 GB of disk space and is made in about 9 GB of memory. A step in bf16 wants 12 GB of memory, one in float32 18 GB;
on a processor without units for bf16 float32 is much faster. Rows are written to benchmarks/results/sdxl.md as they are measured,
and replace the same rows of earlier runs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result_page import Tables  # noqa: E402
from benchmarks.train_step import CASES, HEAD, Case, conditions, load, prepare, step_row  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "sdxl.md"
PARTS = ("open", "step", "names")  # in this order: a process starts with the peak of memory of the one that started it
NAMES_HEAD = [
    "| part | tensors in the file | numbers | weights of Diffusers' model | same names and shapes |",
    "|---|---:|---:|---:|---:|",
]
OPEN_HEAD = [
    "| opening | read, s | load, s | ratio | of processor time | weights, GB | peak beyond the imports, GB | ratio | load |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
]

HEADS = {"open": OPEN_HEAD, "step": HEAD, "names": NAMES_HEAD}

# ---------------------------------------------------------------- names


def file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a .safetensors file, from its header."""
    from library.files import read_safetensors_header

    header = read_safetensors_header(path)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def read_by_diffusers(shapes: Mapping[str, tuple[int, ...]], models: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Part -> Diffusers' name -> shape, as Diffusers converts a single file. models: its own, of each part."""
    import torch
    from diffusers.loaders import single_file_utils as theirs

    file = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    second = "conditioner.embedders.1.model."
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(file), dict(models["unet"].config)),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(file), dict(models["vae"].config)),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(dict(file)),
        "text_encoder_2": theirs.convert_open_clip_checkpoint(models["text_encoder_2"], dict(file), prefix=second),
    }
    return {part: {without_level(name): tuple(value.shape) for name, value in weights.items()} for part, weights in found.items()}


def without_level(name: str) -> str:
    """A text encoder's name without the level that some versions of transformers lack."""
    return name.removeprefix("text_model.")


def names_rows(path: Path) -> Iterator[str]:
    """A row for each part of the model in a file."""
    import math

    from library.models.loading import read_header
    from library.models.modules import weights_of

    family, shapes = read_header(str(path)).family, file_shapes(path)
    models = {}
    for part in family.parts:
        models[part.name] = part.build(part.read_config(read_header(str(path)).shapes[part.name], "epsilon"))
    theirs = read_by_diffusers(shapes, models)
    prefixes = {row.part: row.prefixes[0] for row in family.layout}
    for part in family.parts:
        own = {name: shape for name, shape in shapes.items() if name.startswith(prefixes[part.name])}
        wanted = {without_level(name): tuple(value.shape) for name, value in weights_of(models[part.name]).items()}
        same = sum(theirs[part.name].get(name) == shape for name, shape in wanted.items())
        strange = set(theirs[part.name]) - set(wanted)
        numbers = sum(math.prod(shape) for shape in own.values())
        more = f", {len(strange)} more such as {min(strange)}" if strange else ""
        yield f"| {part.title} | {len(own):,} | {numbers:,} | {len(wanted):,} | {same:,}{more} |"


# ---------------------------------------------------------------- opening


def measured(*arguments: str) -> dict[str, float]:
    """One measurement of benchmarks/load_model.py, in a process of its own."""
    from benchmarks.load_model import in_process

    return in_process(*arguments)


def open_row(path: Path, rounds: int) -> str:
    """Medians of reading and loading by turns, and the highest peak."""
    load_before = load()
    runs: dict[str, list[dict[str, float]]] = {"read": [], "load": []}
    for _ in range(rounds):
        for what in runs:
            runs[what].append(measured("--measure", what, str(path), "--dtype", "fp16"))
    (read, opened), (read_cpu, opened_cpu) = (
        [statistics.median(run[kind] for run in runs[what]) for what in runs] for kind in ("seconds", "cpu")
    )
    weights, peak = runs["load"][0]["weights"], max(run["peak"] for run in runs["load"])
    return (
        f"| {runs['read'][0]['bytes'] / 1e9:.2f} GB, fp16 | {read:.2f} | {opened:.2f} | {opened / read:.2f} "
        f"| {opened_cpu / read_cpu:.2f} | {weights / 1e9:.2f} | {peak / 1e9:.2f} | {peak / weights:.2f} | {load_before} |"
    )


# ---------------------------------------------------------------- the page


def results(path: Path, stated: str) -> Tables:
    """The results file."""
    intro = ["# benchmarks/sdxl.py", "", *__doc__.split("\n\n", 2)[2].strip().splitlines(), ""]
    return Tables(path, [*intro, f"Last run: {stated}."], HEADS)


def prepare_in_own_process(folder: Path, arguments: argparse.Namespace) -> Path:
    """The model's file and the images, unless they are there. In a process of its own: a peak of memory is inherited."""
    if not (folder / "unet.json").exists():
        subprocess.run([sys.executable, __file__, "--make", str(folder), *(["--small"] if arguments.small else [])], check=True)
    prepare(folder, [arguments.size], arguments.small, "sdxl")
    return folder / "model.safetensors"


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """The parts asked for, each row written when it is measured."""
    path, tables = prepare_in_own_process(folder, arguments), results(arguments.out, conditions())
    for part in [part for part in PARTS if part in arguments.parts]:
        if part == "names":
            rows = names_rows(path)
        elif part == "open":
            rows = iter([open_row(path, arguments.rounds)])
        else:
            cases = (Case(arguments.size, 1, arguments.precision, name) for name in arguments.cases)
            rows = (step_row(case, folder, arguments.steps) for case in cases)
        for row in rows:
            tables.add(part, row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--precision", default="bf16", choices=["no", "bf16", "fp16"])
    parser.add_argument("--cases", nargs="+", default=["unet"], choices=CASES, help="of the step, as in train_step.py")
    parser.add_argument("--steps", type=int, default=3, help="of each kind, by turns")
    parser.add_argument("--rounds", type=int, default=3, help="of reading and opening, by turns")
    parser.add_argument("--folder", type=Path, help="where the model (7 GB) and the images are kept for the next time")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)  # the folder for the model: the inner process
    arguments = parser.parse_args()
    if arguments.make:
        prepare(arguments.make, [], arguments.small, "sdxl")
        return
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments, arguments.folder or Path(temporary))


if __name__ == "__main__":
    main()
