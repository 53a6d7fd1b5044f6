"""What the page of a run says: facts that hold from its start, and those of a moment."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel

from library.data.dataset import TrainingDataset
from library.data.page_data import data_tables, token_table
from library.devices import peak_memory_bytes
from library.errors import UserError
from library.option_traits import traits_of
from library.pages.chart_script import copy_chart_script
from library.pages.curves import evenly, extremes, running_mean
from library.pages.images import save_small_copy
from library.training.outputs.config_output import changed_options
from library.training.outputs.from_metadata import as_arguments
from library.training.outputs.summary import network_summary
from library.training.outputs.tracking import LossRecord, shortened
from library.training.plan import Progress

if TYPE_CHECKING:
    from library.training.setup import Run

EXAMPLES = 8
EXAMPLE_SIZE = 384  # pixels
COUNTED = 1000  # captions whose tokens are counted: more would cost seconds
DATASETS = 8  # with curves of their own
DATASET_POINTS, RATE_POINTS, VALIDATIONS = 300, 300, 600


@dataclass(frozen=True)
class Moment:
    """When something was, in seconds of the clock, and after which step."""

    time: float
    step: int


def facts_at_start(run: Run, folder: Path) -> dict[str, Any]:
    """What is known before the first step. Images and the chart's script are copied into `folder`."""
    options, dataset = run.options, run.data.train
    settings, secrets = changed_settings(options)
    name = options.model.pretrained_model_name_or_path or ""
    return {
        "name": options.output.file_stem,
        "lora": run.files.final_path().name,
        "model": Path(name).name or name,
        "model_title": run.model.family.title,
        "base": name,
        "network": network_summary(run.network, options.network.module_name, options.output.save_precision),
        "trigger": options.metadata.metadata_trigger_phrase or "",
        "began": round(float(run.metadata.facts["ss_training_started_at"]) * 1000),
        "chart": copy_chart_script(folder),
        "data": data_facts(dataset, folder),
        "settings": settings,
        "secrets": secrets,
        "command": command(run),
    }  # fmt: skip


def changed_settings(options: BaseModel) -> tuple[list[dict[str, str]], list[str]]:
    """Options that differ from their defaults, and the names of secret ones, whose values are written nowhere."""
    rows, secrets = [], []
    for _, group in options:
        heading = (type(group).__doc__ or "").strip().splitlines()[0]
        for name, field, value in changed_options(group):
            if traits_of(field).secret:
                secrets.append(name)
                continue
            rows.append({
                "group": heading, "name": name, "value": as_text(value), "default": as_text(field.get_default()),
                "help": field.description or "",
            })  # fmt: skip
    return rows, secrets


def as_text(value: Any) -> str:
    """An option's value as people write it; nothing for what is unset."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def command(run: Run) -> str:
    """The command that makes this run again: every option that differs from its default, without secrets, and the seed."""
    given = {
        name: value if not isinstance(value, tuple) else list(value)
        for _, group in run.options
        for name, field, value in changed_options(group)
        if not traits_of(field).secret and name != "resume"
    }
    launch = f"--multi_gpu --num_processes {run.plan.processes} " if run.plan.processes > 1 else ""
    arguments = as_arguments({**given, "seed": run.seed})
    return f"accelerate launch {launch}--num_cpu_threads_per_process 1 train_network.py {' '.join(arguments)}"


def data_facts(dataset: TrainingDataset, folder: Path) -> dict[str, Any]:
    """Buckets, counts, token lengths, tags, and some images as they are trained."""
    return {**data_tables(dataset), "tokens": token_facts(dataset), "examples": examples(dataset, folder)}


def token_facts(dataset: TrainingDataset) -> dict[str, Any] | None:
    """How long the captions are, of at most COUNTED evenly chosen images; None without a tokenizer."""
    tokenizer, rows = dataset.tokenizer, np.flatnonzero(dataset.table.repeats)
    if tokenizer is None:
        return None
    chosen = rows if len(rows) <= COUNTED else rows[np.linspace(0, len(rows) - 1, COUNTED).round().astype(int)]
    captions = [dataset.table.captions[row] for row in chosen.tolist()]
    lengths = {caption: tokenizer.count(caption) for caption in dict.fromkeys(captions)}
    return token_table([lengths[caption] for caption in captions], tokenizer.limit, len(rows))


def examples(dataset: TrainingDataset, folder: Path) -> list[dict[str, Any]]:
    """Images and captions of the first epoch, from batches that are evenly spread over it; what cannot be read is left out."""
    found = []
    for number, position in enumerate(np.unique(np.linspace(0, dataset.num_batches - 1, EXAMPLES).round().astype(int)).tolist()):
        try:
            use = dataset.use(1, position, 0)
        except UserError:  # the run itself reports it
            continue
        name = f"example-{number}.webp"
        save_small_copy(Image.fromarray(use.pixels), folder / name, EXAMPLE_SIZE)
        found.append({
            "src": f"{folder.name}/{name}", "caption": use.caption, "file": use.crop.path.name, "size": list(use.crop.size),
        })  # fmt: skip
    return found


def facts_now(run: Run, progress: Progress, start: Moment, datasets: list[tuple[int, int]]) -> dict[str, Any]:
    """Progress and curves. start: of this process's part of the run. datasets: (step, dataset) of every batch, if several."""
    plan, losses, record = run.plan, run.losses, run.validator.record
    done, seconds = progress.step - start.step, time.time() - start.time
    peak = peak_memory_bytes(run.machine.device)
    return {
        "step": progress.step,
        "steps": plan.max_steps,
        "epoch": min(progress.epoch, plan.epochs),
        "epochs": plan.epochs,
        "speed": seconds / done if done else None,
        "left": (plan.max_steps - progress.step) * seconds / done if done else None,
        "seconds": seconds,
        "average": losses.average,
        "skipped": run.step.skipped,
        "memory": peak or None,
        "best": list(record.best) if record.best else None,
        "validation": [
            [step, loss if math.isfinite(loss) else None] for step, loss in record.history[-VALIDATIONS:]
        ],
        **loss_curves(losses),
        "parts": curves_of_datasets(losses, datasets),
        "rates": rate_curves(losses, progress.step),
    }  # fmt: skip


def loss_curves(losses: LossRecord) -> dict[str, Any]:
    """Each batch (thinned so that all spikes stay) and the running mean."""
    count = min(len(losses.steps), len(losses.values))  # the run goes on while this reads
    steps, values, width = np.array(losses.steps[:count]), np.array(losses.values[:count]), losses.smoothing
    if not count:
        return {"raw": [[], []], "mean": [[], []], "batches": 0, "smoothing": 0}
    return {
        "raw": extremes(steps, values),
        "mean": evenly(steps[width - 1 :], running_mean(values, width)),
        "batches": count,
        "smoothing": width,
    }


def curves_of_datasets(losses: LossRecord, datasets: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The running mean of each dataset's batches, over an equal share of the width. Steps with skipped batches are left out."""
    if not datasets:
        return []
    count = min(len(losses.steps), len(losses.values))
    steps, values = np.array(losses.steps[:count]), np.array(losses.values[:count])
    known = np.array(datasets[:])
    expected, found = Counter(known[:, 0].tolist()), Counter(steps.tolist())
    whole = {step for step, number in found.items() if expected.get(step) == number}
    kept, own = np.isin(steps, list(whole)), known[np.isin(known[:, 0], list(whole)), 1]
    steps, values, curves = steps[kept], values[kept], []
    for number in np.unique(own).tolist()[:DATASETS]:
        is_own = own == number
        width = shortened(max(20, losses.smoothing * int(is_own.sum()) // len(own)), int(is_own.sum()))
        means = running_mean(values[is_own], width)
        curves.append({"number": number + 1, "curve": evenly(steps[is_own][width - 1 :], means, DATASET_POINTS)})
    return curves


def rate_curves(losses: LossRecord, last: int) -> list[dict[str, Any]]:
    """Learning rates; groups with the same one share a curve."""
    curves: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, points in list(losses.rates.items()):
        curves.setdefault(tuple(points[:]), []).append(name)
    found = []
    for curve, names in curves.items():
        steps, rates = zip(*curve, strict=True)
        found.append({"names": names, "curve": evenly([*steps, max(last, steps[-1])], [*rates, rates[-1]], RATE_POINTS)})
    return found
