"""What benchmarks/gpu.py measures, job by job; each job is a process of its own there, and yields its rows as they are measured.

A row that fails says why, and the next one follows.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import caching, generate
from benchmarks.train_step import Case, bare, floor_step, now, precision_name, prepare, train

Row = dict[str, Any]  # "row" names it, other keys are columns; "failed" says why there are none
SIZES = {"sd1": 512, "sdxl": 1024}
TITLES = {"sd1": "SD 1.5", "sdxl": "SDXL"}
UNCOUNTED = 3  # steps before the clock runs
STEPS = {1: 20, 2: 15, 4: 10, 8: 6}  # that count, by batch
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Job:
    """What one process measures. ways: what is added to the plain command of train_network.py, by the name of the row.

    kind: a key of KINDS. seconds: the most that it may take. needs: a package. case: a key of train_step.CASES.
    """

    name: str
    kind: str
    family: str = "sd1"
    precision: str = "fp16"
    ways: dict[str, list[str]] = field(default_factory=lambda: {"": []})
    batches: tuple[int, ...] = (1,)
    seconds: int = 60
    needs: str | None = None
    case: str = "unet"


@dataclass(frozen=True)
class Workspace:
    """Where models and images lie, and how large they are. tiny: small models on small images, to try everything out."""

    folder: Path
    tiny: bool

    def size(self, family: str) -> int:
        return 64 if self.tiny else SIZES[family]

    def folder_of(self, family: str) -> Path:
        return self.folder / family


def measure(job: Job, workspace: Workspace) -> Iterator[Row]:
    """The rows of a job."""
    if job.needs and importlib.util.find_spec(job.needs) is None:
        yield {"row": job.name, "failed": f"the package {job.needs} is not there"}
        return
    yield from KINDS[job.kind](job, workspace)


def tried(name: str, work: Callable[[], Row]) -> Row:
    """The row that `work` measures, or what went wrong. The device's memory is free afterwards."""
    import torch

    try:
        return {"row": name, **work()}
    except torch.cuda.OutOfMemoryError:
        return {"row": name, "failed": "out of memory"}
    except (Exception, SystemExit) as error:  # whatever a package, a driver or a compiler raises
        return {"row": name, "failed": f"{type(error).__name__}: {error}".replace("\n", " ")[:200]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def peaks() -> Row:
    """GB that were in use at most, on the device since the last row, or in this process where there is none."""
    import torch

    from library.devices import peak_memory_bytes

    if torch.cuda.is_available():
        taken = {"peak, GB": torch.cuda.max_memory_allocated() / GIGA}
        return taken | {"with what torch keeps ready, GB": torch.cuda.max_memory_reserved() / GIGA}
    return {"peak, GB": (peak_memory_bytes(torch.device("cpu")) or 0) / GIGA}


# ---------------------------------------------------------------- the machine


def measure_machine(job: Job, workspace: Workspace) -> Iterator[Row]:
    """The models' files; what the device multiplies and copies in a second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for family in SIZES:
        yield tried(f"a file of {TITLES[family]} with random weights", lambda family=family: made_files(family, workspace))
    side = 256 if workspace.tiny else 8192
    rates = {}
    for name, dtype in {"fp16": torch.float16, "bf16": torch.bfloat16, "float32": torch.float32}.items():
        row = tried(f"product of {side} x {side} in {name}", lambda dtype=dtype: {"TFLOP/s": matmul_rate(side, dtype, device)})
        rates[name] = row.get("TFLOP/s", 0)
        yield row
    (workspace.folder / "rates.json").write_text(json.dumps(rates), encoding="utf-8")
    yield tried("copy on the device", lambda: {"GB/s": copy_rate(2**20 if workspace.tiny else 2**30, device)})


def made_files(family: str, workspace: Workspace) -> Row:
    started = time.perf_counter()
    prepare(workspace.folder_of(family), [workspace.size(family)], workspace.tiny, family)
    return {"seconds": time.perf_counter() - started}


def matmul_rate(side: int, dtype: Any, device: str) -> float:
    """TFLOP/s."""
    import torch

    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / least_seconds(lambda: a @ b) / TERA


def copy_rate(count: int, device: str) -> float:
    """GB/s, read and written."""
    import torch

    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / least_seconds(lambda: target.copy_(source)) / GIGA


def least_seconds(work: Callable[[], Any]) -> float:
    """Of six rounds."""
    rounds = []
    for _ in range(6):
        started = now()
        work()
        rounds.append(now() - started)
    return min(rounds)


# ---------------------------------------------------------------- training steps


def measure_steps(job: Job, workspace: Workspace) -> Iterator[Row]:
    """A row for each way and batch: the trainer's own steps, and the bare U-Net's where the job is the plain one."""
    for way, words in job.ways.items():
        for batch in job.batches:
            name = ", ".join(filter(None, [TITLES[job.family], precision_name(job.precision), way, f"batch {batch}"]))
            yield tried(name, lambda words=words, batch=batch: step_row(job, workspace, words, batch))


def step_row(job: Job, workspace: Workspace, words: list[str], batch: int) -> Row:
    """Steps a second and the rest of the row, of one run."""
    from accelerate.state import AcceleratorState

    counted, marks, row = 2 if workspace.tiny else STEPS.get(batch, 5), [], {}
    case = Case(workspace.size(job.family), batch, job.precision, job.case)

    def after_step(run) -> None:
        nonlocal done
        done += 1
        if done <= UNCOUNTED:
            marks.append(now())
        elif done == UNCOUNTED + counted:
            seconds = (now() - marks[-1]) / counted
            row.update({"it/s": 1 / seconds, "images/s": batch / seconds, **useful(job, workspace, batch / seconds)})
            row.update({**peaks(), "first step, s": marks[1] - marks[0]})
            if job.ways == {"": []}:
                row["of the floor's time"] = seconds / floor_seconds(run, case, counted)

    done = 0
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, many runs
    words = [*case.words(workspace.folder_of(job.family), UNCOUNTED + counted), "--no_report", *words]
    train(words, after_step, begin=lambda run: marks.append(now()))
    return row


def floor_seconds(run, case: Case, count: int) -> float:
    """A step of the bare U-Net: forward, and backward to its input."""
    step = floor_step(bare(run.model.denoiser), case)
    for _ in range(2):
        step()
    started = now()
    for _ in range(count):
        step()
    return (now() - started) / count


def useful(job: Job, workspace: Workspace, images: float) -> Row:
    """TFLOP/s that the bare U-Net needs for so many images a second, and their part of the products' rate."""
    rates = json.loads((workspace.folder / "rates.json").read_text(encoding="utf-8"))
    done = unet_flop(workspace.folder_of(job.family) / "unet.json", workspace.size(job.family)) * images / TERA
    return {"TFLOP/s": done, "of the products' rate": done / (rates[precision_name(job.precision)] or float("nan"))}


@cache
def unet_flop(config: Path, size: int) -> int:
    """Operations of a frozen U-Net's forward and of its backward to the input for one image, counted without content."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from library.models.unet import empty_unet

    unet = empty_unet(json.loads(config.read_text(encoding="utf-8"))).requires_grad_(False)
    step = floor_step(unet, Case(size, 1, "no", "unet"))
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        step()
    return counter.get_total_flops()


# ---------------------------------------------------------------- beside the steps


def measure_caching(job: Job, workspace: Workspace) -> Iterator[Row]:
    """Latents of JPEG images, beside the bare VAE."""
    size = workspace.size(job.family)

    def row(batch: int) -> Row:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        images = workspace.folder_of(job.family) / f"photos{size}"
        if not images.exists():
            caching.make_photos(images, size, 4 if workspace.tiny else 32)
        found = caching.measure_encoding(
            images, job.family, size, job.precision, batch, 1 if workspace.tiny else 3, workspace.tiny
        )
        return {"images/s": found["ours"], "floor's images/s": found["bare"], "of the floor's time": found["ratio"],
                **peaks()}  # fmt: skip

    for batch in job.batches:
        name = f"{TITLES[job.family]}, {size} px, {precision_name(job.precision)}, {batch} at once"
        yield tried(name, lambda batch=batch: row(batch))


def measure_drawing(job: Job, workspace: Workspace) -> Iterator[Row]:
    """Images of our pipeline beside those of Diffusers' own with the same model, by turns."""
    import torch

    from library.devices import DTYPES
    from library.generation.pipeline.pipeline import Pipeline
    from library.generation.pipeline.settings import GenerateSettings
    from library.models.loading import load_stable_diffusion

    size, steps = workspace.size(job.family), 2 if workspace.tiny else 20

    def row(batch: int) -> Row:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_stable_diffusion(
            str(workspace.folder_of(job.family) / "model.safetensors"), dtype=DTYPES[job.precision], device=device
        )
        specs = generate.make_specs(size, steps)[:batch]
        pipeline, theirs = Pipeline(model, GenerateSettings(batch_size=batch)), generate.make_pipeline(model, None)
        took: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(2 if workspace.tiny else 4):
            for name, work in (("ours", lambda: list(pipeline.generate(specs))), ("theirs", lambda: theirs(specs))):
                started = now()
                work()
                took[name].append(now() - started)
        ours, floor = (statistics.median(seconds[1:]) for seconds in took.values())
        return {"images/s": batch / ours, "floor's images/s": batch / floor, "of the floor's time": ours / floor,
                **peaks()}  # fmt: skip

    for batch in job.batches:
        name = f"{TITLES[job.family]}, {size} px, {precision_name(job.precision)}, {steps} steps of ddim, batch {batch}"
        yield tried(name, lambda batch=batch: row(batch))


KINDS: dict[str, Callable[[Job, Workspace], Iterator[Row]]] = {
    "machine": measure_machine, "steps": measure_steps, "caching": measure_caching, "drawing": measure_drawing,
}  # fmt: skip
