"""What --gradient_checkpointing_budget buys: a step's seconds and memory with none, some, half and all of the U-Net checkpointed.

    python benchmarks/checkpointing.py [--family sd1|sdxl] [--size 256] [--batch 1] [--precision no] [--steps 3] [--folder FOLDER]

Full-size Stable Diffusion 1.5 or SDXL with random weights and the real trainer, U-Net only, rank 4, latents cached; every row in
a process of its own: the median step after the first, and the peak of the process. The budgets lie at 0, 1/4, 1/2 and all of the
way between what the program estimates without checkpointing and with it. Writes a part of benchmarks/results/checkpointing.md.
Needs about 7 GB in float32, for SDXL in bf16 10 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result_page import write_parts  # noqa: E402
from benchmarks.train_step import Case, Clock, answer, conditions, prepare, train  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "checkpointing.md"
SHARES = {"none": None, "a quarter of the saving": 0.25, "half of the saving": 0.5, "all": 1.0}
FAMILIES = {"sd1": "SD 1.5", "sdxl": "SDXL"}
HEAD = ["| checkpointed | parts | a step, s | of processor time, s | peak, GB |", "|---|---:|---:|---:|---:|"]


def words_of(case: Case, family: str, share: float | None, folder: Path, steps: int) -> list[str]:
    """The command line of a run; share: how much of what checkpointing saves is to be saved."""
    from library.testing import full_size_header
    from library.training.checks.estimates import estimated_bytes
    from library.training.options import parse_options

    words = case.words(folder, steps)
    if share is None:
        return words
    size = (case.size, case.size)
    plain, least = (
        estimated_bytes(parse_options([*words, *more]), full_size_header(family), case.batch, size)
        for more in ([], ["--gradient_checkpointing"])
    )
    budget = [f"--gradient_checkpointing_budget={(plain - share * (plain - least)) / 2**30}"] if share < 1 else []
    return [*words, "--gradient_checkpointing", *budget]


def measure(case: Case, family: str, share: float | None, folder: Path, steps: int) -> dict[str, float]:
    """Medians of the steps after the first, peak bytes, and the number of parts that were checkpointed."""
    from library.devices import peak_memory_bytes
    from library.training.memory.gradient_checkpointing import units

    clock, times, found = Clock(), [], {}

    def after_step(run) -> None:
        times.append(clock.read())
        found["parts"] = sum(unit.gradient_checkpointing for unit in units(run.model.denoiser))
        found["peak"] = peak_memory_bytes(run.machine.device) or 0

    train(words_of(case, family, share, folder, steps + 1), after_step)
    wall, processor = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return found | {"wall": wall, "processor": processor}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--family", default="sd1", choices=FAMILIES)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the model (2 GB) and the images are kept for the next time")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=SHARES, help=argparse.SUPPRESS)  # the inner process
    arguments = parser.parse_args()
    case = Case(arguments.size, arguments.batch, arguments.precision, "unet")
    if arguments.measure:
        found = measure(case, arguments.family, SHARES[arguments.measure], arguments.folder, arguments.steps)
        print("\n" + json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        prepare(folder, [case.size], arguments.small, arguments.family)
        lines = [f"{conditions()}.", "", *HEAD]
        for name in SHARES:
            row = answer([__file__, *sys.argv[1:], f"--measure={name}", f"--folder={folder}"], name)
            lines.append(f"| {name} | {row['parts']} | {row['wall']:.3f} | {row['processor']:.3f} | {row['peak'] / 1e9:.2f} |")
            print(lines[-1], flush=True)
    title = f"{FAMILIES[arguments.family]}, {case.label()}"
    write_parts(arguments.out, "checkpointing.py", __doc__, {title: lines})


if __name__ == "__main__":
    main()
