"""How fast images are made, beside Diffusers' bare `StableDiffusionPipeline` with the same model, sampler, prompts and seeds.

    python benchmarks/generate.py [--size 128] [--steps 10] [--rounds 3]

16 images in batches of 4 by each, batch by batch in turns in one process, so that a busy machine slows both, and compared
pair by pair: "times faster" is the median of these ratios, with the quartiles. Text, denoising and decoding to images count;
saving does not, which the pipeline leaves to others and gen_img_diffusers.py does beside the drawing. The prompts are two, and
one negative prompt for all. With a LoRA: ours applied, and as --network_pre_calc does it; the pipeline's by
`load_lora_weights`. Start-up: a fresh Python process until the sampler's first step, by its parts, from a Diffusers folder of
the same small model; --start_up measures that alone, and writes nothing. On a GPU if there is one. Writes
benchmarks/results/generate.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

IMAGES, BATCH = 16, 4
PROMPTS = ["a photo of a cat on a sofa, morning light", "an old castle above the river at dawn, oil painting"]
NEGATIVE = "blurry, low quality"

# ---------------------------------------------------------------- images


def make_specs(size: int, steps: int) -> list:
    from library.generation.prompts.spec import PromptSpec

    return [
        PromptSpec(PROMPTS[number // 8], NEGATIVE, width=size, height=size, seed=number, steps=steps, sampler="ddim")
        for number in range(IMAGES)
    ]


def make_pipeline(model, lora: Path | None):
    """Diffusers' pipeline; each call makes one batch of specs."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    from library.diffusion.process import NoiseProcess
    from library.diffusion.samplers import make_scheduler

    logging.set_verbosity_error()
    parts = (model.vae, model.text_encoders[0], model.tokenizers[0], model.denoiser, make_scheduler("ddim", NoiseProcess()))
    pipe = StableDiffusionPipeline(*parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)

    def run(batch: list) -> list:
        return pipe(
            [spec.prompt for spec in batch], batch[0].height, batch[0].width, batch[0].steps, guidance_scale=batch[0].scale,
            negative_prompt=[spec.negative_prompt for spec in batch],
            generator=[torch.Generator("cpu").manual_seed(spec.seed) for spec in batch],
        ).images  # fmt: skip

    return run


def fresh_model(device: str):
    from library.testing import small_stable_diffusion

    model = small_stable_diffusion(seed=0)
    for part in (model.denoiser, model.vae, model.text_encoders[0]):
        part.to(device)
    return model


def write_lora(model, path: Path) -> None:
    import torch

    from networks.lora import create_network

    network = create_network(1.0, 16, 16, None, model.text_encoders[0], model.denoiser, conv_dim="8", conv_alpha="8")
    for part in network.loras:
        torch.nn.init.normal_(part.lora_up.weight, std=0.02)
    network.save_weights(path, torch.float32, {})


def timed(work: Callable[[], object], device: str) -> tuple[float, float, object]:
    """Wall-clock seconds, processor seconds and the result."""
    import torch

    started, cpu = time.perf_counter(), time.process_time()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - cpu, result


def _next_images(drawings: Iterator, count: int) -> list:
    return [drawing.image for drawing in islice(drawings, count)]


def compare(way: str, device: str, folder: Path, size: int, steps: int, rounds: int) -> str:
    """One row of the table: medians over the rounds (ratios: over all batches), and the largest difference of the images."""
    import numpy as np

    from library.generation.extras.networks import Networks
    from library.generation.options import NetworkOptions
    from library.generation.pipeline.pipeline import Pipeline
    from library.generation.pipeline.settings import GenerateSettings

    lora = folder / "lora.safetensors" if way != "without a LoRA" else None
    if lora is not None and not lora.exists():
        write_lora(fresh_model("cpu"), lora)
    ours_model, specs = fresh_model(device), make_specs(size, steps)
    files = [str(lora)] if lora is not None else []
    networks = Networks.load(ours_model, NetworkOptions(network_weights=files, network_pre_calc="pre_calc" in way))
    pipeline = make_pipeline(fresh_model(device), lora)

    warm_up = specs[:BATCH]
    list(Pipeline(ours_model, GenerateSettings(batch_size=BATCH, networks=networks)).generate(warm_up)), pipeline(warm_up)
    totals: list[tuple[float, ...]] = []
    ratios: list[tuple[float, float]] = []
    difference = 0
    for turn in range(rounds):
        seconds = {"ours": [0.0, 0.0], "theirs": [0.0, 0.0]}
        images = Pipeline(ours_model, GenerateSettings(batch_size=BATCH, networks=networks)).generate(specs)
        for start in range(0, IMAGES, BATCH):
            batch = specs[start : start + BATCH]
            jobs = {"ours": partial(_next_images, images, len(batch)), "theirs": partial(pipeline, batch)}
            results, took = {}, {}
            for name in list(jobs)[:: 1 if (turn + start // BATCH) % 2 == 0 else -1]:
                *took[name], results[name] = timed(jobs[name], device)
                seconds[name] = [sum(pair) for pair in zip(seconds[name], took[name], strict=True)]
            ratios.append(tuple(theirs / ours for ours, theirs in zip(took["ours"], took["theirs"], strict=True)))
            for one, other in zip(results["ours"], results["theirs"], strict=True):
                difference = max(difference, int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max()))
        totals.append((*seconds["ours"], *seconds["theirs"]))
    ours, ours_cpu, theirs, theirs_cpu = (statistics.median(column) for column in zip(*totals, strict=True))
    faster, leaner = (statistics.quantiles(column, n=4) for column in zip(*ratios, strict=True))
    return (
        f"| {way} | {ours:.2f} | {theirs:.2f} | {faster[1]:.2f} ({faster[0]:.2f} to {faster[2]:.2f}) | {ours_cpu:.2f} | "
        f"{theirs_cpu:.2f} | {leaner[1]:.2f} | {difference} |"
    )


# ---------------------------------------------------------------- start-up

# Each prints what the clocks say, wall and processor, after the imports, with the model there, and after the first step.
MARK = """
import json, sys, time
marks = []
def mark(*_): marks.append((time.time(), time.process_time()))
def stop(*_):
    mark()
    print(json.dumps(marks), flush=True)
    raise SystemExit
"""
OURS = """
from library.imports import garbage_collection_paused, import_model_libraries
with garbage_collection_paused():
    from library.generation.loading import load_model
    from library.generation.options import ModelOptions, SpeedOptions
    from library.generation.pipeline.pipeline import Pipeline
    from library.generation.prompts.spec import PromptSpec
import_model_libraries()
mark()
model = load_model(ModelOptions(ckpt={folder!r}), SpeedOptions())
mark()
list(Pipeline(model).generate([PromptSpec("a cat", "", width=64, height=64, seed=1, steps=1)], progress=stop))
"""
THEIRS = """
from diffusers import StableDiffusionPipeline
mark()
pipe = StableDiffusionPipeline.from_pretrained({folder!r}, safety_checker=None, requires_safety_checker=False)
pipe.to("cuda" if __import__("torch").cuda.is_available() else "cpu")
mark()
pipe("a cat", 64, 64, 1, callback_on_step_end=stop)
"""


def start_up(program: str, folder: Path) -> list[float]:
    """Of a fresh process: wall-clock seconds of imports, model and first step, then of all, then processor seconds of all."""
    started = time.time()
    code = [sys.executable, "-W", "ignore", "-c", MARK + program.format(folder=str(folder))]
    done = subprocess.run(code, cwd=ROOT, check=True, capture_output=True, text=True)
    (imports, _), (model, _), (step, processor) = json.loads(done.stdout.splitlines()[-1])
    return [imports - started, model - imports, step - model, step - started, processor]


def compare_start_ups(folder: Path, rounds: int) -> list[str]:
    """A table with a row for each, medians of rounds in which they take turns."""
    from library.models.saving import save_stable_diffusion

    save_stable_diffusion(fresh_model("cpu"), folder / "model")
    programs = {"ours": OURS, "pipeline": THEIRS}
    runs: dict[str, list[list[float]]] = {name: [] for name in programs}
    for turn in range(rounds):
        for name in list(programs)[:: 1 if turn % 2 == 0 else -1]:
            runs[name].append(start_up(programs[name], folder / "model"))
    rows = {name: [statistics.median(column) for column in zip(*measured, strict=True)] for name, measured in runs.items()}
    rows["pipeline / ours"] = [theirs / ours for ours, theirs in zip(rows["ours"], rows["pipeline"], strict=True)]
    head = ["| start-up | imports, s | model, s | first step, s | in all, s | processor, s |", "|---|---|---|---|---|---|"]
    return head + [f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |" for name, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start_up", action="store_true")
    options = parser.parse_args()
    if options.start_up:
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(compare_start_ups(Path(folder), options.rounds)))
        return

    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} processor cores, no GPU"
    load = f"; load of the machine {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    lines = [
        f"{platform.machine()}, {where}, {torch.get_num_threads()} thread(s); torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}; float32, small random model, {options.size} x {options.size}, {options.steps} steps of ddim, "
        f"scale 7.5; medians of {options.rounds} rounds{load}.",
        "",
        "| 16 images in batches of 4 | ours, s | pipeline, s | times faster | processor: ours, s | pipeline, s | ratio "
        "| largest difference, of 255 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for way in ("without a LoRA", "LoRA applied", "LoRA, pre_calc"):
            lines.append(compare(way, device, Path(folder), options.size, options.steps, options.rounds))
            print(lines[-1], flush=True)
        start_ups = compare_start_ups(Path(folder), options.rounds)
    print(*start_ups, sep="\n")
    lines += ["", *start_ups]
    intro = ["# benchmarks/generate.py", "", *__doc__.split("\n\n", 2)[2].strip().splitlines(), ""]
    (ROOT / "benchmarks" / "results" / "generate.md").write_text("\n".join([*intro, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
