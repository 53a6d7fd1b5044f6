"""What a training step costs when another program has one of the cores.

    python benchmarks/busy_machine.py [--steps 30] [--rounds 3]

Trains on the shipped base model and its example images with all cores, in processes of their own, by turns; with nothing else
running, and beside one process that does nothing but count. OpenMP's threads wait as they do by themselves (GNU's own value
of GOMP_SPINCOUNT is 300,000), and as library/openmp.py lets them wait on a quiet and on a busy machine. A figure is the median
of all steps but the first five, and of the rounds. Needs a machine that is quiet otherwise. Writes
benchmarks/results/busy_machine.md. For Linux: elsewhere torch has another OpenMP.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import conditions, train  # noqa: E402
from library.openmp import BUSY_SPINS, QUIET_SPINS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "busy_machine.md"
SPINS = {"OpenMP's own": 300_000, "quiet": QUIET_SPINS, "busy": BUSY_SPINS}
SIZES = {"64 px, base of the demo": 64, "128 px, base of the demo": 128}
UNCOUNTED = 5


def words(folder: Path, size: int, steps: int) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={ROOT / 'assets' / 'base-model'}",
        f"--train_data_dir={ROOT / 'assets' / 'example' / 'lineart'}", "--caption_extension=.txt", f"--resolution={size}",
        f"--output_dir={folder}", "--output_name=benchmark", "--network_module=networks.lora", "--network_dim=4",
        "--network_train_unet_only", "--learning_rate=1e-4", "--train_batch_size=4", "--seed=1", "--cache_latents",
        "--max_data_loader_n_workers=0", f"--max_train_steps={steps}",
    ]  # fmt: skip


def measure(size: int, steps: int) -> float:
    """Median seconds of a step, in this process."""
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train(words(Path(folder), size, steps), lambda run: marks.append(time.perf_counter()))
    seconds = [after - before for before, after in zip(marks[:-1], marks[1:], strict=True)]
    return statistics.median(seconds[UNCOUNTED:])


def in_own_process(size: int, steps: int, spins: int) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    command = [sys.executable, __file__, f"--steps={steps}", f"--measure={size}"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env={**environment, "GOMP_SPINCOUNT": str(spins)})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure, args.steps))
        return
    rows = []
    for name, size in SIZES.items():
        found: dict[tuple[int, bool], list[float]] = {}
        for _ in range(args.rounds):
            for busy in (False, True):
                other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
                try:
                    for spins in SPINS.values():
                        found.setdefault((spins, busy), []).append(in_own_process(size, args.steps, spins))
                finally:
                    if other:
                        other.kill()
        median = {key: statistics.median(values) for key, values in found.items()}
        quiet = median[SPINS["OpenMP's own"], False]
        cells = [median[spins, busy] for busy in (False, True) for spins in SPINS.values()]
        rows.append(f"| {name} | " + " | ".join(f"{cell:.3f} ({cell / quiet:.2f} x)" for cell in cells) + " |")
        print(rows[-1], flush=True)
    columns = [f"{where}, {spins:,} turns" for where in ("quiet", "one core taken") for spins in SPINS.values()]
    head = [f"| seconds a step, batch 4 | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    text = ["# benchmarks/busy_machine.py", "", __doc__.strip(), "", f"Last run: {conditions()}", "", *head, *rows]
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
