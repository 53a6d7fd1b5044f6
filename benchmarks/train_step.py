"""What a training step costs beside its floor, and what a launch costs, for full-size Stable Diffusion 1.5 with random weights.

    python benchmarks/train_step.py [--sizes 256 512] [--batches 1 4] [--precisions no bf16 fp16] [--cases unet ...] [--steps 5]

ours: the step of train_network.py, with its own options, data pipeline and loop; latents are cached, so that the U-Net is what
counts.
floor: the bare U-Net of Diffusers, forward and backward to its input, in the same precision, nothing attached, no autocast.

Both compute with the same weights in the same process, by turns; the ratio is that of the medians after one step of each. With
the text encoder trained the floor is still the U-Net alone, but in rows that say "and in the floor": there the U-Net reads what
the bare text encoder gives, and the backward pass goes on to its embeddings. With a packed base the floor is timed with the
packed layers. Peak memory is that of two more processes, from their start on; the floor's holds nothing but the U-Net. A launch
is one of train_network.py, timed by what it prints. Rows are written to benchmarks/results/train_step.md as they are measured,
and replace the same rows of earlier runs. A size of 512 in float32 wants 12 GB.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result_page import Tables  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "train_step.md"
# What a run prints on its way to the end of its first step.
MARKS = {"first line": b"loading libraries", "checks": b"memory: about", "ready": b"\nnetwork ", "first step": b"training: 100%"}
CAPTIONS = ("a red kite above the sea", "two cats asleep on a sofa", "an old stone bridge", "a bowl of cherries")
IMAGES, SAMPLER_STEPS = 8, 4

UNET_ONLY = ["--network_train_unet_only"]
CASES = {
    "unet": ("LoRA rank 4", UNET_ONLY),
    "rank32": ("LoRA rank 32", [*UNET_ONLY, "--network_dim=32"]),
    "c3lier": ("C3Lier rank 4", [*UNET_ONLY, "--network_args", "conv_dim=4"]),
    "dylora": ("DyLoRA rank 4", [*UNET_ONLY, "--network_module=networks.dylora"]),
    "checkpointing": ("LoRA rank 4, checkpointing", [*UNET_ONLY, "--gradient_checkpointing"]),
    "text": ("LoRA rank 4, text encoder too", []),
    "text_checkpointing": ("LoRA rank 4, text encoder too, checkpointing", ["--gradient_checkpointing"]),
}
DEFAULT_CASES = list(CASES)
CASES |= {
    "text_floor": ("LoRA rank 4, text encoder too and in the floor", []),
    "compiled": ("LoRA rank 4, --torch_compile", [*UNET_ONLY, "--torch_compile"]),
    "cached": ("LoRA rank 4, texts cached", [*UNET_ONLY, "--cache_text_encoder_outputs"]),
    **{name: (f"LoRA rank 4, {name} base", [*UNET_ONLY, f"--base_dtype={name}"]) for name in ("int8", "fp8", "nf4")},
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    size: int
    batch: int
    precision: str
    kind: str

    def words(self, folder: Path, steps: int) -> list[str]:
        """The command line of train_network.py for it."""
        return [
            f"--pretrained_model_name_or_path={folder / 'model.safetensors'}", f"--train_data_dir={folder / f'{self.size}px'}",
            "--caption_extension=.txt", f"--output_dir={folder / 'out'}", "--output_name=benchmark",
            "--network_module=networks.lora", "--learning_rate=1e-4", "--seed=1", "--cache_latents", "--cache_latents_to_disk",
            "--max_data_loader_n_workers=0", f"--max_train_steps={steps}", f"--resolution={self.size}",
            f"--train_batch_size={self.batch}", f"--mixed_precision={self.precision}", *CASES[self.kind][1],
        ]  # fmt: skip

    def label(self) -> str:
        return f"{self.size} px, batch {self.batch}, {precision_name(self.precision)}, {CASES[self.kind][0]}"


def precision_name(precision: str) -> str:
    """What a value of --mixed_precision is called in tables."""
    return {"no": "float32"}.get(precision, precision)


# ---------------------------------------------------------------- files


def make_model(folder: Path, small: bool, family: str = "sd1") -> None:
    """An fp16 checkpoint with random weights, in full size or that of the tiny model, and the configuration of its U-Net."""
    from benchmarks.load_model import make_file
    from library.models.saving import save_stable_diffusion
    from library.testing import full_size_configs, small_sdxl, small_stable_diffusion

    if small:
        model = {"sd1": small_stable_diffusion, "sdxl": small_sdxl}[family]()
        save_stable_diffusion(model, folder / "model.safetensors")
    else:
        make_file(folder / "model.safetensors", "safetensors", family)
    config = dict(model.denoiser.config) if small else full_size_configs(family)["unet"]
    (folder / "unet.json").write_text(json.dumps(config), encoding="utf-8")


def make_images(folder: Path, size: int) -> None:
    """Noise images of the training size, with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTIONS[number % len(CAPTIONS)], encoding="utf-8")


def prepare(folder: Path, sizes: Iterable[int], small: bool, family: str = "sd1") -> None:
    """Make the model and the images of these sizes, unless the folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "unet.json").exists():
        make_model(folder, small, family)
    for size in sizes:
        if not (folder / f"{size}px").exists():
            make_images(folder / f"{size}px", size)


# ---------------------------------------------------------------- measuring, in a process of its own


def train(words: list[str], after_step: Callable, begin: Callable = lambda run: None) -> None:
    """Train with these options; `begin(run)` is called before the first step, `after_step(run)` at the end of every step."""
    from library.training.entry import train
    from library.training.loop import Listener
    from library.training.options import parse_options

    class Watch(Listener):
        def begin(self, run) -> None:
            self.run = run
            begin(run)

        def after_step(self, progress, report) -> None:
            after_step(self.run)

    train(parse_options(words), [Watch()])


def clocked(owner: object, name: str, parts: dict[str, float], part: str):
    """While it lasts, the seconds of every call of `owner.name` are added to parts[part]."""
    own = getattr(owner, name)

    def with_clock(*args, **kwargs):
        started = time.perf_counter()
        try:
            return own(*args, **kwargs)
        finally:
            parts[part] = parts.get(part, 0.0) + time.perf_counter() - started

    return mock.patch.object(owner, name, with_clock)


def now() -> float:
    """Seconds, with everything done that was begun on the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Wall-clock and processor seconds since it was last read, to the end of what runs on the device."""

    def __init__(self) -> None:
        self.marks = (0.0, 0.0)

    def read(self) -> tuple[float, float]:
        before, self.marks = self.marks, (now(), time.process_time())
        return self.marks[0] - before[0], self.marks[1] - before[1]


def floor_step(unet, case: Case, text_encoders: Sequence = ()) -> Callable[[], None]:
    """Forward and backward of a bare U-Net to its input, and of the text encoders that it reads to their embeddings, if any."""
    import torch

    settings = {"device": unet.device, "dtype": unet.dtype}
    side = case.size // 8
    latents = torch.randn(case.batch, unet.config.in_channels, side, side, **settings, requires_grad=True)
    noise = torch.randn(case.batch, 77, unet.config.cross_attention_dim, **settings)
    tokens = torch.randint(1, 1000, (case.batch, 77), device=unet.device)
    begins = [_position_embeddings(encoder) for encoder in text_encoders]
    times = torch.full((case.batch,), 500, device=unet.device)
    added = {}
    if unet.config.addition_embed_type == "text_time":
        vector = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        sizes = torch.tensor([[case.size, case.size, 0, 0, case.size, case.size]] * case.batch, device=unet.device)
        added = {"text_embeds": torch.randn(case.batch, vector, **settings), "time_ids": sizes}

    def step() -> None:
        context = torch.cat([encode(tokens).last_hidden_state for encode in text_encoders], dim=2) if text_encoders else noise
        unet(latents, times, context, added_cond_kwargs=added).sample.float().square().mean().backward()
        for begin in (latents, *begins):
            begin.grad = None

    return step


def _position_embeddings(encoder):
    """The encoder's own copy of them, which takes gradients: with them the backward pass goes through the whole encoder."""
    from torch import nn

    embedding = next(module for path, module in encoder.named_modules() if path.endswith("position_embedding"))
    embedding.weight = nn.Parameter(embedding.weight.detach().clone())
    return embedding.weight


def bare(model):
    """The same model with the same tensors and the library's own layers, without what is attached to it."""
    from torch import nn

    from library.training.memory.frozen import FrozenConv2d, FrozenLinear

    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for module in twin.modules():
        module.__class__ = {FrozenConv2d: nn.Conv2d, FrozenLinear: nn.Linear}.get(type(module), type(module))
        module._compiled_call_impl = None
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module.__dict__.pop("forward", None)
    return twin


def measure_time(case: Case, folder: Path, steps: int) -> dict[str, float]:
    """Medians in seconds, by turns; the first step of each does not count."""
    clock, ours, floors, floor = Clock(), [], [], []

    def floor_of(model):
        encoders = [bare(encoder) for encoder in model.text_encoders] if case.kind == "text_floor" else []
        return floor_step(bare(model.denoiser), case, encoders)

    def after_step(run) -> None:
        ours.append(clock.read())
        floor[:] = floor or [floor_of(run.model)]
        clock.read()
        floor[0]()
        floors.append(clock.read())

    train(case.words(folder, steps + 1), after_step)
    (wall, cpu), (floor_wall, floor_cpu) = (
        [statistics.median(c) for c in zip(*times[1:], strict=True)] for times in (ours, floors)
    )
    return {"ours": wall, "floor": floor_wall, "ratio": wall / floor_wall, "cpu_ratio": cpu / floor_cpu}


def measure_ours(case: Case, folder: Path, steps: int) -> dict[str, float]:
    """Peak bytes of a run of three steps."""
    from library.devices import peak_memory_bytes

    peaks = []
    train(case.words(folder, 3), lambda run: peaks.append(peak_memory_bytes(run.machine.device) or 0))
    return {"peak": peaks[-1]}


def measure_floor(case: Case, folder: Path, steps: int) -> dict[str, float]:
    """Peak bytes of a process that does three steps with a U-Net alone."""
    import torch

    from library.devices import DTYPES, peak_memory_bytes
    from library.models.unet import empty_unet

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = (
        empty_unet(json.loads((folder / "unet.json").read_text(encoding="utf-8")))
        .to(DTYPES[case.precision])
        .to_empty(device=device)
    )
    for parameter in unet.requires_grad_(False).parameters():
        torch.nn.init.uniform_(parameter, -0.05, 0.05)
    if "checkpointing" in case.kind:
        unet.enable_gradient_checkpointing()
    step = floor_step(unet.train(), case)
    for _ in range(3):
        step()
    return {"peak": peak_memory_bytes(device) or 0}


def measure_launch(case: Case, folder: Path) -> dict[str, float]:
    """Seconds from the start of train_network.py to what it prints on its way, and to the end of its first step."""
    started, times, shown = time.perf_counter(), {}, b""
    words = [sys.executable, "-u", "train_network.py", *case.words(folder, 1)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0) as run:
        assert run.stdout is not None
        while chunk := run.stdout.read(1 << 16):
            shown += chunk
            for what, mark in MARKS.items():
                if what not in times and mark in shown:
                    times[what] = time.perf_counter() - started
    if run.returncode or times.keys() != MARKS.keys():
        raise SystemExit(f"{case.label()}: the launch failed:\n{shown.decode(errors='replace')[-3000:]}")
    return times


def measure_aside(case: Case, folder: Path, steps: int) -> dict[str, float]:
    """Seconds of what a run does beside its steps: caching all latents, writing a file, 100 lines of the log, a preview."""
    import library.training.setup as setup
    from library.training.outputs.tracking import StepLoss

    (folder / "prompts.txt").write_text(f"a red kite --w {case.size} --h {case.size} --s {SAMPLER_STEPS}\n", encoding="utf-8")
    found: dict[str, float] = {}

    def after_step(run) -> None:
        facts = run.metadata.at(step=1, epoch=1)
        rates = dict.fromkeys(run.network.group_names, 1e-4)
        with clocked(run.files, "save", found, "file"):
            run.files.save(run.files.step_path(1), run.network.module, facts)
        with clocked(run.tracker, "log_step", found, "log"):
            for at in range(100, 200):
                run.tracker.log_step(at, rates, {}, StepLoss(0.1, 0.1))
        with clocked(run.previews, "draw", found, "preview"):
            run.previews.draw("e000001", step=1)

    words = [*case.words(folder, 1), f"--logging_dir={folder / 'logs'}", f"--sample_prompts={folder / 'prompts.txt'}"]
    with clocked(setup, "cache_latents", found, "caching"):
        train([word for word in words if word != "--cache_latents_to_disk"] + ["--sample_every_n_epochs=1000"], after_step)
    return found


MEASURES = {"time": measure_time, "ours": measure_ours, "floor": measure_floor, "aside": measure_aside}


def in_own_process(what: str, case: Case, folder: Path, steps: int = 1) -> dict[str, float]:
    """This script again, for one measurement."""
    words = [__file__, "--measure", what, json.dumps(asdict(case)), f"--folder={folder}", f"--steps={steps}"]
    return answer(words, f"{case.label()}: measuring {what}")


def answer(words: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """The last line, in JSON, of what a script prints in a process of its own. what: its name if it fails."""
    command, variables = [sys.executable, *words], {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=variables)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------- the tables

HEAD = [
    "| one step | ours, s | floor, s | ours / floor | of processor time | ours, GB | floor, GB | ratio | load |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
]
ASIDE_HEAD = [
    "| launch, seconds from its start, and what is beside the steps | first line | checks done | model and data ready "
    "| end of the first step | caching, images/s | a file, s | a log line, ms | a preview, s | load |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
]


def load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "?"


def step_row(case: Case, folder: Path, steps: int) -> str:
    load_before = load()
    times = in_own_process("time", case, folder, steps)
    ours, floor = (in_own_process(which, case, folder)["peak"] / 1e9 for which in ("ours", "floor"))
    return (
        f"| {case.label()} | {times['ours']:.3f} | {times['floor']:.3f} | {times['ratio']:.3f} | {times['cpu_ratio']:.3f} "
        f"| {ours:.2f} | {floor:.2f} | {ours / floor:.2f} | {load_before} |"
    )


def aside_row(case: Case, folder: Path) -> str:
    load_before = load()
    measure_launch(case, folder)  # fills the cache on disk
    launch, aside = measure_launch(case, folder), in_own_process("aside", case, folder)
    parts = " | ".join(f"{launch[name]:.1f}" for name in MARKS)
    return (
        f"| launch at {case.size} px | {parts} | {IMAGES / aside['caching']:.2f} | {aside['file']:.2f} "
        f"| {10 * aside['log']:.2f} | {aside['preview']:.1f} | {load_before} |"
    )


def conditions() -> str:
    import torch

    from library.errors import counted

    if torch.cuda.is_available():
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    return (
        f"torch {torch.__version__}, {os.cpu_count()} cores of {platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), "
        f"{counted(torch.get_num_threads(), 'thread')}"
    )


def results(path: Path, stated: str) -> Tables:
    """The results file."""
    intro = ["# benchmarks/train_step.py", "", *__doc__.split("\n\n", 2)[2].strip().splitlines(), ""]
    about = f"Last run: {stated}. A preview has {SAMPLER_STEPS} sampler steps."
    return Tables(path, [*intro, about], {"steps": HEAD, "aside": ASIDE_HEAD})


def measure_all(arguments: argparse.Namespace, folder: Path) -> None:
    """The launch at each size, then every case, a line of the tables after the other."""
    prepare(folder, arguments.sizes, arguments.small)
    tables = results(arguments.out, conditions())
    precisions, sizes, batches = arguments.precisions, arguments.sizes, arguments.batches
    for size in sizes:
        tables.add("aside", aside_row(Case(size, 1, precisions[0], "unet"), folder))
    for case in [Case(*row) for row in itertools.product(sizes, batches, precisions, arguments.cases)]:
        tables.add("steps", step_row(case, folder, arguments.steps))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--precisions", nargs="+", default=["no"], choices=["no", "bf16", "fp16"])
    parser.add_argument("--cases", nargs="+", default=DEFAULT_CASES, choices=CASES)
    parser.add_argument("--steps", type=int, default=5, help="of each kind, by turns")
    parser.add_argument("--folder", type=Path, help="where the model (2 GB) and the images are kept for the next time")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # what and case: the inner process
    arguments = parser.parse_args()
    if arguments.measure:
        what, case = arguments.measure
        print("\n" + json.dumps(MEASURES[what](Case(**json.loads(case)), arguments.folder, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        measure_all(arguments, arguments.folder or Path(temporary))


if __name__ == "__main__":
    main()
