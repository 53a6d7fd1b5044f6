"""What --torch_compile costs and brings on this machine: a run's first step, the others, and how far its LoRA moves.

    python benchmarks/compiling.py [--sizes 256 512] [--precision no] [--steps 5] [--folder FOLDER]

Full-size Stable Diffusion 1.5 with random weights and the real trainer, U-Net only, rank 4, latents cached; every row is a run in
a process of its own: plain; compiled for the first time; compiled with the cache that the row before has left on the disk. The
first step is from the beginning of the program to that step's end. The difference is |compiled - plain| / |plain| over the
trained up factors, which begin at 0. Writes a part of benchmarks/results/compiling.md for each size. A size takes about five
minutes.
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

RESULTS = ROOT / "benchmarks" / "results" / "compiling.md"
WAYS = {"plain": [], "compiled, first run": ["--torch_compile"], "compiled, second run": ["--torch_compile"]}
HEAD = [
    "| | to the end of the first step, s | a step, s | as times the plain one | difference of the LoRA |",
    "|---|---:|---:|---:|---:|",
]


def measure(case: Case, way: str, folder: Path, steps: int) -> dict[str, float]:
    """Seconds of the first step and of the median of the others; the up factors, which begin at 0, are kept in the folder."""
    import torch

    clock, times, trained = Clock(), [], []

    def after_step(run) -> None:
        times.append(clock.read()[0])
        if len(times) == 1 + steps:
            weights = run.network.module.state_dict()
            trained.extend(weights[name].float().flatten() for name in sorted(weights) if "lora_up" in name)

    clock.read()
    train([*case.words(folder, steps + 1), *WAYS[way]], after_step)
    torch.save(torch.cat(trained), folder / "trained.pt")
    return {"first": times[0], "step": statistics.median(times[1:])}


def in_own_process(case: Case, way: str, folder: Path, steps: int, cache: str) -> dict[str, float]:
    words = [__file__, f"--sizes={case.size}", f"--precision={case.precision}", f"--steps={steps}"]
    return answer([*words, f"--folder={folder}", f"--measure={way}"], way, {"TORCHINDUCTOR_CACHE_DIR": cache})


def rows(case: Case, folder: Path, steps: int) -> list[str]:
    """A row for each way, measured in a process of its own."""
    import torch

    lines, plain_step, plain = [], 0.0, torch.zeros(0)
    with tempfile.TemporaryDirectory() as cache:
        in_own_process(case, "plain", folder, 1, cache)  # fills the cache of latents
        for way in WAYS:
            found, trained = in_own_process(case, way, folder, steps, cache), torch.load(folder / "trained.pt")
            if way == "plain":
                plain_step, plain = found["step"], trained
            difference = ((trained - plain).norm() / plain.norm()).item()
            share = found["step"] / plain_step
            lines.append(f"| {way} | {found['first']:.1f} | {found['step']:.3f} | {share:.3f} | {difference:.1e} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the model (2 GB) and the images are kept for the next time")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)  # the inner process
    arguments = parser.parse_args()
    cases = [Case(size, 1, arguments.precision, "unet") for size in arguments.sizes]
    if arguments.measure:
        print("\n" + json.dumps(measure(cases[0], arguments.measure, arguments.folder, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        prepare(folder, arguments.sizes, arguments.small)
        for case in cases:
            lines = [f"{conditions()}.", "", *HEAD, *rows(case, folder, arguments.steps)]
            write_parts(arguments.out, "compiling.py", __doc__, {case.label(): lines})


if __name__ == "__main__":
    main()
