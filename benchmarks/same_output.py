"""Record what fixed small runs of the suite write, so that two checkouts can be compared byte for byte.

    python benchmarks/same_output.py record FOLDER [--suite ROOT] [--inputs FOLDER] [--only NAME ...]
    python benchmarks/same_output.py compare FOLDER_A FOLDER_B

`record` runs the scripts of the checkout at ROOT (default: the one of this file) by their command lines and keeps everything: a
folder for each run holds its files, the printed text and the exit codes. A run that fails is recorded like any other. The models,
LoRA files and images that the runs read lie in --inputs (default: the folder "inputs" beside FOLDER). They are made once, by the
checkout of this file, and kept: both recordings must read the same files. One core needs about four minutes.

`compare` prints a line for each run and what differs in it, and exits with 1 if anything does. It compares safetensors files by
tensors and metadata, images by pixels and PNG text, text by lines, other files by bytes. What may differ between two recordings
of one checkout is in METADATA_THAT_VARIES and TEXT_THAT_VARIES. Record both on one machine: another processor rounds otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = "recording.json"
TIME_LIMIT = 300.0  # seconds for a command
SHOWN = 6  # differences shown for a file

METADATA_THAT_VARIES = {
    "modelspec.date": "a time",
    "modelspec.implementation_version": "the checkout's commit",
    "saved_at": "a time, in a state's JSON",
    "ss_sd_scripts_commit_hash": "the checkout's commit",
    "ss_session_id": "drawn anew for each run",
    "ss_training_finished_at": "a time",
    "ss_training_started_at": "a time",
}
TEXT_THAT_VARIES = [
    (r"(?<!\d)20\d{12}(?!\d)", "TIME", "a time in a file's name"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "TIME", "a time"),
    (r"\b[0-9a-f]{40}\b", "COMMIT", "the checkout's commit"),
    (r"\b\d+(\.\d+)? s\b", "SECONDS", "a duration or a speed"),
    (r"\S+\.py:\d+", "LINE", "the line of the code that a warning comes from"),
    (r"(free|peak memory) +\d+(\.\d+)? GiB", r"\1 MEMORY", "what the machine had free, and what the process used"),
    (r"(\"random.pt\": \[\s*\d+,\s*)\d+", r"\1VARIES", "the checksum of a file with VALUES_THAT_VARY"),
    *[
        (rf"({re.escape(key)}\"?\s*[:=]\s*)(\"[^\"]*\"|[^\s,}}]+)", r"\1VARIES", reason)
        for key, reason in METADATA_THAT_VARIES.items()
    ],
]
VALUES_THAT_VARY = {
    "/value/numpy/1": "numpy's global generator in a state's random.pt: nothing seeds it, and nothing draws from it"
}
PROGRESS_BAR = re.compile(r"\d+%\|")  # drawn anew every tenth of a second: their number depends on the speed

MODEL = dict(unet_channels=(32, 32, 64, 64), vae_channels=(32, 32, 32, 32), text_width=32, text_layers=2)
IMAGE_SIZES = ((96, 64), (64, 96), (64, 64), (80, 80), (100, 60), (64, 64))
BLOCK_DIMS = "2,2,2,2,2,2,4,4,4,4,4,4,8,4,4,4,4,4,4,2,2,2,2,0,2"
CONV_BLOCK_DIMS = "1,1,1,1,1,1,2,2,2,2,2,2,4,2,2,2,2,2,2,1,1,1,1,0,1"
DATASET = """
[general]
caption_extension = ".txt"
enable_bucket = true
min_bucket_reso = 32
bucket_reso_steps = 32
[[datasets]]
resolution = 64
batch_size = 2
  [[datasets.subsets]]
  image_dir = "INPUTS/images"
  num_repeats = 2
  keep_tokens = 1
  shuffle_caption = true
  caption_tag_dropout_rate = 0.3
  caption_prefix = "sks, "
  random_crop = true
  [[datasets.subsets]]
  image_dir = "INPUTS/regularisation"
  is_reg = true
  class_tokens = "thing"
"""


@dataclass(frozen=True)
class Run:
    """Commands (a script and its words), done one after another in a folder of their own."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    copies: tuple[str, ...] = ()  # inputs that the run writes beside, and so gets a copy of
    processes: int = 1


def all_runs(suite: Path, inputs: Path) -> list[Run]:
    """Every run, in the order of recording."""
    scripts = [path for folder in (suite, suite / "networks", suite / "tools") for path in sorted(folder.glob("*.py"))]
    programs = [path.relative_to(suite).as_posix() for path in scripts if '__name__ == "__main__"' in path.read_text("utf-8")]
    helps = [(name, "--help") for name in programs if name != "tools/doctor.py"]  # which describes the machine
    return [Run("help", tuple(helps)), *training_runs(inputs), *image_runs(inputs), *tool_runs(inputs)]


def training_runs(inputs: Path) -> list[Run]:
    """Runs of train_network.py of 2 to 4 steps."""

    def words(*more: str, model: str = "sd1", steps: int = 3, data: str | None = None) -> tuple[str, ...]:
        return (
            "train_network.py", f"--pretrained_model_name_or_path={inputs / model}.safetensors",
            f"--train_data_dir={data or inputs / 'images'}", "--caption_extension=.txt", "--resolution=64", "--enable_bucket",
            "--min_bucket_reso=32", "--bucket_reso_steps=32", "--train_batch_size=2", "--shuffle_caption", "--flip_aug",
            "--caption_dropout_rate=0.2", "--output_dir=out", "--output_name=mine", "--network_module=networks.lora",
            "--network_dim=4", "--network_alpha=2", "--seed=1", "--learning_rate=1e-3", "--mixed_precision=no",
            "--max_data_loader_n_workers=0", f"--max_train_steps={steps}", *more,
        )  # fmt: skip

    def train(name: str, *more: str, **settings: Any) -> Run:
        return Run(name, (words(*more, **settings),))

    resumed = ("--save_state", "--lr_scheduler=cosine", "--network_dropout=0.1")
    conv = ("--network_args", "conv_dim=2", "conv_alpha=1")
    in_two = words("--max_train_epochs=2", "--gradient_accumulation_steps=1")
    return [
        train("lierla"),
        train("c3lier", *conv),
        train("dylora", "--network_module=networks.dylora", "--network_args", "unit=2", "conv_dim=4"),
        train("block_ranks", "--network_args", f"block_dims={BLOCK_DIMS}", f"conv_block_dims={CONV_BLOCK_DIMS}"),
        train("text_encoder_only", "--network_train_text_encoder_only", "--clip_skip=2"),
        train("unet_only", "--network_train_unet_only", "--unet_lr=5e-4", "--text_encoder_lr=1e-4"),
        train("sd2_v", "--v2", "--v_parameterization", *conv, model="sd2"),
        train(
            "sd2_options", "--v2", "--v_parameterization", "--zero_terminal_snr", "--scale_v_pred_loss_like_noise_pred",
            "--min_snr_gamma=5", "--weighted_captions", "--max_token_length=150", model="sd2",
        ),
        train("dora", "--network_args", "dora=True", "conv_dim=2"),
        train("pissa", "--network_args", "init=pissa"),
        train(
            "network_options", "--network_dropout=0.1", "--scale_weight_norms=0.5", "--network_args", "rank_dropout=0.2",
            "module_dropout=0.2", "loraplus_lr_ratio=4", "rs_lora=True", "down_lr_weight=sine+.5", "mid_lr_weight=1.5",
        ),
        train(
            "loss_options", "--min_snr_gamma=5", "--noise_offset=0.05", "--multires_noise_iterations=4", "--ip_noise_gamma=0.1",
            "--loss_type=huber", "--adaptive_noise_scale=0.01",
        ),
        train(
            "memory_options", "--gradient_checkpointing", "--base_dtype=int8", "--optimizer_type=Adafactor",
            "--fused_backward_pass",
        ),
        train("base_weights", f"--base_weights={inputs / 'lora_a.safetensors'}", "--base_weights_multiplier=0.7"),
        train(
            "network_weights", f"--network_weights={inputs / 'lora_a.safetensors'}", "--dim_from_weights",
            "--save_precision=fp16", "--no_metadata", "--save_model_as=ckpt",
        ),
        train(
            "validation_ema", "--validation_split=0.4", "--validate_every_n_steps=1", "--ema_decay=0.9", "--save_every_n_steps=1",
            f"--sample_prompts={inputs / 'prompts.txt'}", "--sample_every_n_steps=2", "--sample_sampler=ddim",
        ),
        Run("cached", (words("--cache_latents_to_disk", "--network_train_unet_only", data="images"),), copies=("images",)),
        train("dataset_file", f"--dataset_config={inputs / 'data.toml'}", "--gradient_accumulation_steps=2"),
        Run("resume", (words(*resumed, steps=2), words(*resumed, "--resume=out/mine-state", steps=4))),
        Run("two_processes", (in_two,), processes=2),
    ]  # fmt: skip


def image_runs(inputs: Path) -> list[Run]:
    """Runs of gen_img_diffusers.py in 3 steps."""

    def draw(name: str, *more: str, model: str = "sd1") -> Run:
        words = (
            "gen_img_diffusers.py", f"--ckpt={inputs / model}.safetensors", f"--from_file={inputs / 'prompts.txt'}",
            "--outdir=out", "--W=64", "--H=64", "--steps=3", "--seed=5", "--sequential_file_name", *more,
        )  # fmt: skip
        return Run(name, (words,))

    lora = (
        "--network_module", "networks.lora", "networks.lora", "--network_weights", f"{inputs / 'lora_a.safetensors'}",
        f"{inputs / 'lora_b.safetensors'}", "--network_mul", "0.8", "0.5",
    )  # fmt: skip
    source = f"--image_path={inputs / 'images'}"
    return [
        draw("images_plain", "--sampler=euler_a", "--images_per_prompt=2", "--batch_size=2"),
        draw("images_sd2", "--v2", "--v_parameterization", model="sd2"),
        draw("images_lora", *lora),
        draw("images_lora_merged", *lora, "--network_merge"),
        draw("images_from_image", source, "--strength=0.7"),
        draw("images_inpainted", source, f"--mask_path={inputs / 'masks'}"),
        draw(
            "images_highres", "--W=128", "--H=128", "--highres_fix_scale=0.5", "--highres_fix_steps=2", "--highres_fix_save_1st"
        ),
        draw("images_sheet", *lora[3:5], *lora[:2], "--sheet", "--sheet_strengths", "0", "1"),
    ]


def tool_runs(inputs: Path) -> list[Run]:
    """One run for each of the tools' ways."""

    def tool(name: str, script: str, *words: str) -> Run:
        return Run(name, ((script, *words),))

    sd1, sd2, tuned, lora_a, lora_b, lora_sd2, dylora = (
        str(inputs / f"{name}.safetensors") for name in ("sd1", "sd2", "tuned", "lora_a", "lora_b", "lora_sd2", "dylora")
    )
    images, out = str(inputs / "images"), ("--save_to", "out.safetensors")
    loras = ("--models", lora_a, lora_b, "--ratios", "0.8", "-0.3")
    models = ("--model_org", sd1, "--model_tuned", tuned)
    merge, svd_merge = "networks/merge_lora.py", "networks/svd_merge_lora.py"
    resize, split = "networks/resize_lora.py", "networks/extract_lora_from_dylora.py"
    extract, check = "networks/extract_lora_from_models.py", "networks/check_lora_weights.py"
    convert, resize_images = "tools/convert_diffusers20_original_sd.py", "tools/resize_images_to_resolution.py"
    return [
        tool("merge_into_model", merge, "--sd_model", sd1, *out, *loras),
        tool("merge_into_ckpt", merge, "--sd_model", sd1, "--save_to=out.ckpt", *loras, "--save_precision=fp16"),
        tool("merge_into_sd2", merge, "--sd_model", sd2, "--v2", *out, "--models", lora_sd2, "--ratios", "0.6"),
        tool("merge_loras", merge, *out, *loras),
        tool("svd_merge", svd_merge, *out, *loras, "--new_rank=3", "--lbw", "MIDD", "ALL"),
        tool("resize", resize, "--model", lora_a, *out, "--new_rank=2", "--new_conv_rank=1"),
        tool("resize_dynamic", resize, "--model", lora_a, *out, "--new_rank=4", "--dynamic_method=sv_fro", "--dynamic_param=0.9"),
        tool("extract", extract, *models, *out, "--dim=3", "--conv_dim=2", "--save_precision=fp16"),
        tool("extract_explained", extract, *models, *out, "--explained=0.7", "--clamp_quantile=0.99"),
        tool("split_dylora", split, "--model", dylora, *out, "--unit=2"),
        tool("check", check, lora_a, "--show_all_keys"),
        tool("check_sd2", check, lora_sd2),
        Run("convert", ((convert, sd1, "folder"), (convert, "folder", "back.safetensors"))),
        Run("convert_sd2", ((convert, sd2, "folder", "--v2"), (convert, "folder", "back.ckpt", "--fp16"))),
        tool(
            "resize_images", resize_images, images, "out", "--max_resolution=64x64,32x32", "--divisible_by=8", "--save_as_png",
            "--copy_associated_files",
        ),
        tool("resize_images_jpeg", resize_images, images, "out", "--max_resolution=48x48"),
    ]  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Make the models, LoRA files, images and texts that the runs read, unless they are there."""
    if folder.exists():
        return
    sys.path.insert(0, str(ROOT))
    from library.models.saving import save_stable_diffusion
    from library.testing import small_stable_diffusion

    unfinished = folder.with_name(f".{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in ("images", "masks", "regularisation"):
        (unfinished / name).mkdir(parents=True)
    sd1 = small_stable_diffusion(seed=1, **MODEL)
    sd2 = small_stable_diffusion(seed=2, family="sd2", v_parameterization=True, **MODEL)
    for name, model in (("sd1", sd1), ("sd2", sd2)):
        save_stable_diffusion(model, unfinished / f"{name}.safetensors")
    save_lora(unfinished / "lora_a.safetensors", sd1, seed=3, conv_dim="2", conv_alpha="1")
    save_lora(unfinished / "lora_b.safetensors", sd1, seed=4)
    save_lora(unfinished / "lora_sd2.safetensors", sd2, seed=5)
    save_lora(unfinished / "dylora.safetensors", sd1, seed=6, module="dylora", unit="2")
    change_weights(sd1.denoiser, seed=7)
    save_stable_diffusion(sd1, unfinished / "tuned.safetensors")
    for number, (width, height) in enumerate(IMAGE_SIZES):
        random_image((width, height), number).save(unfinished / "images" / f"{number}.png")
        (unfinished / "images" / f"{number}.txt").write_text(f"thing {number}, (bright:1.2), plain, of noise", encoding="utf-8")
        random_image((width, height), number + 50).convert("L").save(unfinished / "masks" / f"{number}.png")
    random_image((64, 64), 99).save(unfinished / "regularisation" / "0.png")
    (unfinished / "prompts.txt").write_text("a thing --s 3 --d 1\na (bright:1.3) thing --n dark --d 2 --l 5\n", encoding="utf-8")
    (unfinished / "data.toml").write_text(DATASET.replace("INPUTS", folder.as_posix()), encoding="utf-8")
    unfinished.rename(folder)


def save_lora(path: Path, model: Any, seed: int, module: str = "lora", **network_args: str) -> None:
    """Save a LoRA of rank 4 for the model with random weights."""
    import importlib

    import torch

    generator = torch.Generator().manual_seed(seed)
    network = importlib.import_module(f"networks.{module}").create_network(
        1.0, 4, 2.0, model.vae, model.text_encoders[0], model.denoiser, **network_args
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) - 0.5) * 0.2)
    version = model.family.records.base_model_version["epsilon"]
    record = {
        "ss_network_module": f"networks.{module}",
        "ss_base_model_version": version,
        "ss_network_args": json.dumps(network_args),
    }
    network.save_weights(str(path), torch.float32, record)


def change_weights(unet: Any, seed: int) -> None:
    """Add noise to the attention and the residual blocks."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn" in name or "conv1" in name:
                parameter.add_((torch.rand(parameter.shape, generator=generator) - 0.5) * 0.05)


def random_image(size: tuple[int, int], seed: int) -> Any:
    """An RGB image of soft random colours."""
    import random

    from PIL import Image

    small = Image.frombytes("RGB", (6, 6), random.Random(seed).randbytes(108))
    return small.resize(size, Image.Resampling.BICUBIC)


def digest(folder: Path) -> str:
    """A hash of the folder's files and their names."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def record(folder: Path, suite: Path, inputs: Path, only: list[str]) -> int:
    """Do the runs and return how many commands failed."""
    make_inputs(inputs)
    runs = all_runs(suite, inputs)
    unknown = sorted(set(only) - {run.name for run in runs})
    if unknown:
        raise SystemExit(f"error: no run {', '.join(unknown)}; the runs are {', '.join(run.name for run in runs)}")
    runs = [run for run in runs if run.name in only or not only]
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"suite": str(suite), "inputs": str(inputs), "folder": str(folder), "digest of the inputs": digest(inputs)}
    (folder / RECORD).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    started, failures = time.perf_counter(), 0
    for number, run in enumerate(runs, 1):
        before = time.perf_counter()
        outcome = ", ".join(filter(None, do_run(run, folder / run.name, suite, inputs))) or "done"
        failures += outcome.count("exit code ")
        print(f"[{number:2}/{len(runs)}] {run.name:20} {time.perf_counter() - before:6.1f} s  {outcome}", flush=True)
    if digest(inputs) != facts["digest of the inputs"]:
        raise SystemExit(f"error: a run changed {inputs}; give that run a copy")
    print(f"{len(runs)} runs in {time.perf_counter() - started:.0f} s, {failures} commands failed; recorded in {folder}")
    return failures


def do_run(run: Run, folder: Path, suite: Path, inputs: Path) -> Iterator[str]:
    """Do a run's commands; yield what is worth saying of each, or nothing."""
    if run.processes > 1 and not has_gloo():
        yield "skipped: this torch has no gloo, which processes on a CPU talk through"
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in run.copies:
        shutil.copytree(inputs / name, folder / name)
    names: list[str] = []
    for script, *words in run.commands:
        stem = Path(script).stem
        names.append(stem)
        label = f"{stem}-{names.count(stem)}" if names.count(stem) > 1 else stem
        code, output, errors = execute([*launcher(run.processes), str(suite / script), *words], folder)
        for kind, text in (("out", output), ("err", errors), ("code", f"{code}\n")):
            (folder / f"{label}.{kind}.txt").write_text(text, encoding="utf-8")
        last_lines = [line for line in printed_lines(errors) if line.strip()][-2:]
        yield f"{label}: exit code {code}: {' / '.join(last_lines)}" if code else ""


def launcher(processes: int) -> list[str]:
    """The words before the script: Python alone, or accelerate's launcher as docs/scaling.md has it."""
    if processes == 1:
        return [sys.executable]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = (
        f"--multi_gpu --num_processes {processes} --num_machines 1 --mixed_precision no --dynamo_backend no "
        f"--num_cpu_threads_per_process 1 --main_process_port {port}"
    )
    return [sys.executable, "-m", "accelerate.commands.launch", *words.split()]


def execute(command: list[str], folder: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of a command that runs in the folder on one thread of the CPU."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    settings = {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg",
        "PYTHONUTF8": "1", "COLUMNS": "120", "NO_COLOR": "1",
    }  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=folder, env={**kept, **settings}, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        return -1, "", f"longer than {TIME_LIMIT:.0f} s"
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def has_gloo() -> bool:
    import torch.distributed as distributed

    return distributed.is_available() and distributed.is_gloo_available()


def compare(one: Path, two: Path) -> int:
    """Print how two recordings differ, and return the number of runs that do."""
    sides = [Recording(one), Recording(two)]
    if sides[0].facts["digest of the inputs"] != sides[1].facts["digest of the inputs"]:
        raise SystemExit("error: the recordings read different inputs; record both with the same --inputs")
    runs = list(dict.fromkeys(name for side in sides for name in side.run_names()))
    different = 0
    for run in runs:
        files = [side.files(run) for side in sides]
        lines = list(differences_of_runs(files, sides))
        different += bool(lines)
        print(f"{'DIFFERS' if lines else 'same':8} {run:20} {len(files[0].keys() | files[1].keys())} files")
        for line in lines:
            print(f"           {line}")
    print(f"{len(runs) - different} of {len(runs)} runs are the same")
    return different


class Recording:
    """A folder that `record` wrote."""

    def __init__(self, folder: Path) -> None:
        if not (folder / RECORD).is_file():
            raise SystemExit(f"error: {folder} is no recording: it has no {RECORD}")
        self.folder = folder
        self.facts: dict[str, str] = json.loads((folder / RECORD).read_text(encoding="utf-8"))

    def run_names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir())

    def files(self, run: str) -> dict[str, Path]:
        """Every file of a run by its name in the run's folder, without times; names that differ by time alone get numbers."""
        found: dict[str, Path] = {}
        for path in sorted((self.folder / run).rglob("*")):
            if path.is_file():
                name = base = self.normalised(path.relative_to(self.folder / run).as_posix())
                number = 1
                while name in found:
                    number += 1
                    name = f"{base} ({number})"
                found[name] = path
        return found

    def normalised(self, text: str) -> str:
        """The text without what TEXT_THAT_VARIES names, and with words for this recording's folders."""
        for key in ("folder", "inputs", "suite"):
            for path in (self.facts[key], Path(self.facts[key]).as_posix()):
                text = text.replace(path, key.upper())
        for pattern, replacement, _ in TEXT_THAT_VARIES:
            text = re.sub(pattern, replacement, text)
        return text


def differences_of_runs(files: list[dict[str, Path]], sides: list[Recording]) -> Iterator[str]:
    """A line for each difference of a run's files."""
    for name in sorted(files[0].keys() | files[1].keys()):
        for number in (0, 1):
            if name not in files[number]:
                yield f"{name}: missing in {sides[number].folder}"
        if name in files[0] and name in files[1]:
            found = list(differences(files[0][name], files[1][name], sides))
            yield from (f"{name}: {line}" for line in found[:SHOWN])
            if len(found) > SHOWN:
                yield f"{name}: and {len(found) - SHOWN} more differences"


def differences(one: Path, two: Path, sides: list[Recording]) -> Iterator[str]:
    """What differs in two files, by their kind."""
    if one.read_bytes() == two.read_bytes():
        return
    suffix = one.suffix.lower()
    if suffix == ".safetensors":
        tensors, metadata = zip(*(read_safetensors(path) for path in (one, two)), strict=True)
        yield from differing_items("tensor", *tensors, same_tensor, tensor_difference)
        yield from differing_items(
            "metadata", *(varying_left_out(values, side) for values, side in zip(metadata, sides, strict=True))
        )
    elif suffix in (".png", ".jpg", ".webp"):
        yield from image_differences(one, two, sides)
    elif suffix in (".txt", ".json", ".toml", ".csv", ".jsonl"):
        yield from text_differences(one, two, sides)
    elif suffix in (".ckpt", ".pt"):
        yield from pickle_differences(one, two)
    else:
        yield f"bytes differ ({one.stat().st_size} and {two.stat().st_size} bytes)"


def differing_items(
    what: str,
    one: dict[str, Any],
    two: dict[str, Any],
    same: Callable[[Any, Any], bool] = lambda a, b: a == b,
    describe: Callable[[Any, Any], str] = lambda a, b: f"{a!s:.60} became {b!s:.60}",
) -> Iterator[str]:
    """What two dictionaries do not share."""
    for key in sorted(one.keys() | two.keys()):
        if key not in two:
            yield f"{what} {key}: only in the first"
        elif key not in one:
            yield f"{what} {key}: only in the second"
        elif not same(one[key], two[key]):
            yield f"{what} {key}: {describe(one[key], two[key])}"


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def varying_left_out(metadata: dict[str, str], side: Recording) -> dict[str, str]:
    """The metadata; of keys that may vary only that they are there."""
    return {key: "VARIES" if key in METADATA_THAT_VARIES else side.normalised(value) for key, value in metadata.items()}


def same_tensor(one: Any, two: Any) -> bool:
    """Whether dtype, shape and every bit are the same; a NaN equals itself."""
    import torch

    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (one, two)))


def same_value(one: Any, two: Any) -> bool:
    return same_tensor(one, two) if hasattr(one, "dtype") and hasattr(two, "dtype") else one == two


def tensor_difference(one: Any, two: Any) -> str:
    if not (hasattr(one, "dtype") and hasattr(two, "dtype")):
        return f"{one!s:.60} became {two!s:.60}"
    if one.dtype != two.dtype or one.shape != two.shape:
        return f"{one.dtype} {tuple(one.shape)} became {two.dtype} {tuple(two.shape)}"
    distance = (one.double() - two.double()).abs()
    return f"{int((distance != 0).sum())} of {one.numel()} numbers differ, by at most {float(distance.max()):.3g}"


def pickle_differences(one: Path, two: Path) -> Iterator[str]:
    """What differs in the values, or, where these are the same and none may vary, in the archives' files."""
    values = [flat(read_pickle(path)) for path in (one, two)]
    fixed = [{key: value for key, value in found.items() if key not in VALUES_THAT_VARY} for found in values]
    lines = list(differing_items("value", *fixed, same_value, tensor_difference))
    if not lines and fixed[0].keys() == values[0].keys():
        lines = list(differing_items("file in the archive", archive(one), archive(two), describe=lambda a, b: "bytes differ"))
    yield from lines


def read_pickle(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def archive(path: Path) -> dict[str, bytes]:
    """The files in what torch.save wrote, without their common folder: it is named after the temporary file."""
    with zipfile.ZipFile(path) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a nest of dictionaries and lists, by their way down."""
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, (list, tuple)):
        inner = enumerate(value)
    else:
        return {name: value}
    return {key: leaf for word, below in inner for key, leaf in flat(below, f"{name}/{word}").items()}


def image_differences(one: Path, two: Path, sides: list[Recording]) -> Iterator[str]:
    """What differs in mode, size, pixels and PNG text."""
    import numpy as np
    from PIL import Image

    with Image.open(one) as first, Image.open(two) as second:
        if (first.mode, first.size) != (second.mode, second.size):
            yield f"{first.mode} {first.size} became {second.mode} {second.size}"
        elif first.tobytes() != second.tobytes():
            distance = np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int))
            yield f"{(distance != 0).mean():.1%} of the values differ, by at most {distance.max()}"
        texts = [
            {key: side.normalised(str(value)) for key, value in getattr(image, "text", {}).items()}
            for image, side in zip((first, second), sides, strict=True)
        ]
        yield from differing_items("PNG text", *texts)


def text_differences(one: Path, two: Path, sides: list[Recording]) -> Iterator[str]:
    """The lines that differ, as diff has them."""
    import difflib

    texts = [
        side.normalised("\n".join(printed_lines(path.read_text(encoding="utf-8", errors="replace")))).splitlines()
        for path, side in zip((one, two), sides, strict=True)
    ]
    for line in difflib.unified_diff(*texts, n=0, lineterm=""):
        if not line.startswith(("---", "+++", "@@")):
            yield f"{line[:200]}"


def printed_lines(text: str) -> list[str]:
    """The lines of what a command printed, without progress bars, and without spaces at their ends."""
    lines = re.split(r"[\r\n]+", text)
    return [line.rstrip() for line in lines if line.strip() and not PROGRESS_BAR.search(line)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the suite and keep what it writes")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--suite", type=Path, default=ROOT, metavar="ROOT", help="the checkout to run (default: this one)")
    recording.add_argument("--inputs", type=Path, help='what the runs read (default: "inputs" beside the folder)')
    recording.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these runs")
    comparison = commands.add_parser("compare", help="show how two recordings differ")
    comparison.add_argument("one", type=Path)
    comparison.add_argument("two", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        return min(1, compare(options.one, options.two))
    folder = options.folder.resolve()
    inputs = (options.inputs or folder.parent / "inputs").resolve()
    return min(1, record(folder, options.suite.resolve(), inputs, options.only))


if __name__ == "__main__":
    sys.exit(main())
