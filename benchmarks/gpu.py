"""Everything there is to measure on a GPU, in one command and under ten minutes.

    python benchmarks/gpu.py [--minutes 9] [--folder FOLDER] [--only WORD ...] [--out FILE] [--tiny]

Full-size SD 1.5 at 512 px and SDXL at 1024 px with random weights, which are made on the device. The machine's own rates;
training steps of a LoRA of rank 4 with latents cached (the trainer's own command and loop): fp16 and bf16, batch 1 to 8,
xformers, torch.compile, CUDA graphs, AdamW8bit, the base in int8, fp8 and nf4; the command of the guide, whose memory counts;
caching beside the bare VAE; images beside Diffusers' own pipeline.

TFLOP/s are those that the bare U-Net's forward and its backward to the input need, whatever else a step does; their part is of
the rate at which the device multiplies large matrices in that precision. The floor is the bare U-Net of Diffusers, in eager mode
and with nothing attached, or the bare VAE, or Diffusers' pipeline. Peaks are of the whole run, loading included.

Every job is a process with a time of its own, the most important ones first; a row that fails says why, and the next one
follows. What there is no time for any more is named. The page is written row by row: benchmarks/results/gpu.md. Needs what
requirements.txt names (bitsandbytes and xformers only for their own rows), 10 GB of disk space and 24 GB of a GPU for all rows;
on a smaller one rows say "out of memory". --tiny tries everything out with small models, also without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_measures import Job, Row, Workspace, measure  # noqa: E402
from benchmarks.result_page import write_parts  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu.md"
CHECKPOINTING = ["--gradient_checkpointing"]
GUIDE = [
    *CHECKPOINTING,
    "--optimizer_type=AdamW8bit",
    "--xformers",
]  # the first command of the guide, which trains the text encoder too
COMPILED = {"compiled": ["--torch_compile"]}
GRAPHS = {"CUDA graphs": ["--torch_compile", "--dynamo_backend=cudagraphs"]}
XFORMERS = {"xformers": ["--xformers"]}
PACKED = {f"base in {name}": [f"--base_dtype={name}", *CHECKPOINTING] for name in ("int8", "fp8", "nf4")}
EIGHT_BIT = {"AdamW8bit": ["--optimizer_type=AdamW8bit"]}

JOBS = (
    Job("machine", "machine", seconds=120),
    Job("SD 1.5, the guide's command", "steps", ways={"the guide's command": GUIDE}, case="text", seconds=45),
    Job("SD 1.5, eager, fp16", "steps", batches=(1, 8, 2, 4), seconds=90),
    Job("SD 1.5, CUDA graphs", "steps", ways=GRAPHS, batches=(1, 8), seconds=90),
    Job("SD 1.5, compiled", "steps", ways=COMPILED, batches=(1, 8), seconds=150),
    Job("SDXL, eager, bf16", "steps", "sdxl", "bf16", batches=(1, 4), seconds=80),
    Job("SD 1.5, drawing", "drawing", batches=(1, 4), seconds=60),
    Job("SD 1.5, caching", "caching", batches=(1, 4), seconds=40),
    Job("SD 1.5, memory", "steps", ways={"checkpointing": CHECKPOINTING, **PACKED, **EIGHT_BIT}, seconds=80),
    Job("SDXL, memory", "steps", "sdxl", "bf16", ways={"checkpointing": CHECKPOINTING, **PACKED, **EIGHT_BIT}, seconds=100),
    Job("SD 1.5, eager, bf16", "steps", precision="bf16", batches=(1, 8), seconds=60),
    Job("SD 1.5, text encoder too", "steps", ways={"text encoder too": []}, case="text", batches=(1, 8), seconds=50),
    Job("SD 1.5, xformers", "steps", ways=XFORMERS, batches=(1, 8), seconds=50, needs="xformers"),
    Job("SDXL, caching", "caching", "sdxl", "bf16", seconds=40),
    Job("SDXL, eager, fp16", "steps", "sdxl", "fp16", seconds=45),
    Job("SDXL, CUDA graphs", "steps", "sdxl", "bf16", ways=GRAPHS, seconds=60),
    Job("SDXL, compiled", "steps", "sdxl", "bf16", ways=COMPILED, seconds=150),
    Job("SDXL, eager, bf16, large", "steps", "sdxl", "bf16", batches=(8,), seconds=60),
)  # fmt: skip
TITLES = {"machine": "The machine", "steps": "Training steps", "caching": "Caching latents", "drawing": "Images"}
LEAST_SECONDS = 15  # what a process needs to import and to begin
MARK = "ROW "

Runner = Callable[[Job, Workspace, float], Iterator[Row]]  # (job, where, seconds) -> its rows

# ---------------------------------------------------------------- a process for each job


def in_own_process(job: Job, workspace: Workspace, seconds: float) -> Iterator[Row]:
    """The rows of a job as its process prints them, until it ends or its time is over; the last one may say what went wrong."""
    words = [sys.executable, __file__, "--job", job.name, f"--folder={workspace.folder}", *(["--tiny"] if workspace.tiny else [])]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace", cwd=ROOT)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
        until, is_late = time.monotonic() + seconds, False
        try:
            while (line := lines.get(timeout=max(0.01, until - time.monotonic()))) is not None:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
        except queue.Empty:
            is_late = True
        finally:
            process.kill()
            code = process.wait()
        if is_late:
            yield {"row": job.name, "failed": f"not done after {seconds:.0f} s"}
        elif code:
            errors.seek(0)
            last = ([line for line in errors.read().splitlines() if line.strip()] or ["nothing was printed"])[-1]
            yield {"row": job.name, "failed": f"the process ended with {code}: {last[:200]}"}


def _pass_on(process: subprocess.Popen, lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    process.wait()  # here, so that its code is there when the end is read
    lines.put(None)


def here(job: Job, workspace: Workspace, seconds: float) -> Iterator[Row]:
    """The rows of a job, measured in this process."""
    yield from measure(job, workspace)


# ---------------------------------------------------------------- the page


class Page:
    """The results, in a table for each kind of job, and the conditions; written anew with each row."""

    def __init__(self, path: Path, stated: str) -> None:
        self.path, self.stated, self.started = path, stated, time.monotonic()
        self.rows: dict[str, list[Row]] = {}

    def add(self, job: Job, row: Row) -> None:
        self.rows.setdefault(job.kind, []).append(row)
        shown = ", ".join(f"{key} {cell(value)}" for key, value in row.items() if key != "row")
        print(f"{time.monotonic() - self.started:4.0f} s  {row['row']}: {shown}", flush=True)
        tables = {TITLES[kind]: table(rows) for kind, rows in self.rows.items()}
        write_parts(self.path, "gpu.py", __doc__, {"Conditions": [self.stated], **tables})


def table(rows: list[Row]) -> list[str]:
    """A column for each key that a row has, and below it what failed."""
    measured, failed = [row for row in rows if "failed" not in row], [row for row in rows if "failed" in row]
    keys = list(dict.fromkeys(key for row in measured for key in row if key != "row"))
    lines = [f"| | {' | '.join(keys)} |", "|---" + "|---:" * len(keys) + "|"] if measured else []
    lines += [f"| {row['row']} | {' | '.join(cell(row.get(key)) for key in keys)} |" for row in measured]
    return lines + [""] * bool(measured and failed) + [f"- {row['row']}: {row['failed']}" for row in failed]


def cell(value: object) -> str:
    """Three digits of a number."""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def conditions() -> str:
    """Device, driver, versions and this machine, in a line."""
    import importlib.metadata as metadata

    import torch

    versions = []
    for name in ("torch", "diffusers", "transformers", "bitsandbytes", "xformers", "triton"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    device = "no GPU"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        device = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return f"{device}; {os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}; {', '.join(versions)}."


# ---------------------------------------------------------------- the whole


def chosen_jobs(words: list[str], tiny: bool) -> list[Job]:
    """The jobs whose names hold one of the words (none: all), always with the machine's own; as they are on small models."""
    jobs = [job for job in JOBS if job.kind == "machine" or not words or any(word in job.name for word in words)]
    return [in_small(job) for job in jobs] if tiny else jobs


def in_small(job: Job) -> Job:
    """The same with small batches, and where there is no GPU in float32, since fp16 is not for processors."""
    import torch

    precision = job.precision if torch.cuda.is_available() else "no"
    return replace(job, batches=tuple(batch for batch in job.batches if batch <= 2) or (1,), precision=precision)


def measure_all(jobs: list[Job], workspace: Workspace, page: Page, minutes: float, run: Runner = in_own_process) -> None:
    """Job after job as long as there is time."""
    until = time.monotonic() + 60 * minutes
    for job in jobs:
        left = until - time.monotonic()
        if left < LEAST_SECONDS:
            page.add(job, {"row": job.name, "failed": "not begun, the time was over"})
            continue
        for row in run(job, workspace, min(left, job.seconds)):
            page.add(job, row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--folder", type=Path, help="where the models (9 GB) and the images are kept for the next time")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="jobs whose names hold one of these words")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="small models on small images, to try everything out")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # the inner process
    arguments = parser.parse_args()
    if arguments.job:
        (job,) = (job for job in chosen_jobs([], arguments.tiny) if job.name == arguments.job)
        for row in measure(job, Workspace(arguments.folder, arguments.tiny)):
            print(f"\n{MARK}{json.dumps(row)}", flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        jobs = chosen_jobs(arguments.only, arguments.tiny)
        measure_all(jobs, Workspace(folder, arguments.tiny), Page(arguments.out, conditions()), arguments.minutes)


if __name__ == "__main__":
    main()
