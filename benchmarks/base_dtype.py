"""What --base_dtype saves and what it costs in quality: bytes, error of the U-Net, loss of a short training.

    python benchmarks/base_dtype.py [--steps 80] [--seeds 1 2 3] [--formats int8 fp8 nf4] [--only memory quality training]

memory: U-Net and text encoder of full-size Stable Diffusion 1.5 in fp16, every layer packed as in a run, one at a time; and the
estimate that a run prints at 512 px, batch 1, U-Net only, with checkpointing. quality: how far the U-Net of assets/base-model
(trained, 64 px) gets from its own output, as a part of that output's size, on noisy images of assets/example at five
timesteps. training: the demo's command on that model, with every fifth image held out, the same seeds for all; the validation
loss at the end has the same noise and timesteps for all. Writes benchmarks/results/base_dtype.md, part by part.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.result_page import write_parts  # noqa: E402
from benchmarks.train_step import conditions  # noqa: E402
from library.training.memory.packing import CLASSES, FORMATS, pack_layer, pack_weights  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "base_dtype.md"
PLAIN = "none"
IMAGES, TIMESTEPS = 8, (50, 250, 450, 650, 850)


# ---------------------------------------------------------------- memory


def model_bytes(name: str, dtype: torch.dtype = torch.float16) -> tuple[int, int]:
    """Bytes of SD 1.5's U-Net and text encoder in this format. Layers of the same shape are packed once."""
    from library.models.clip import empty_text_encoder
    from library.models.unet import empty_unet
    from library.testing import sd15_configs

    configs = sd15_configs()
    models = empty_unet(configs["unet"]), empty_text_encoder(configs["text_encoder"])
    return tuple(bytes_of(model, name, dtype) for model in models)


def bytes_of(model: torch.nn.Module, name: str, dtype: torch.dtype) -> int:
    """Bytes of the weights of a model without content, its layers packed with random weights."""
    whole = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if name == PLAIN:
        return whole
    layers = [layer for layer in model.modules() if type(layer) in CLASSES]
    shapes = Counter((type(layer), tuple(layer.weight.shape)) for layer in layers)
    return whole - sum(count * saved_bytes(kind, shape, name, dtype) for (kind, shape), count in shapes.items())


def saved_bytes(kind: type, shape: tuple[int, ...], name: str, dtype: torch.dtype) -> int:
    sizes = (shape[1], shape[0]) if kind is torch.nn.Linear else (shape[1], shape[0], shape[2:])
    layer = kind(*sizes, bias=False, dtype=dtype).requires_grad_(False)
    return pack_layer(layer, name)


def estimate(name: str) -> float:
    """GiB that the pre-flight of a run tells: 512 px, batch 1, fp16, U-Net only, rank 4, gradient checkpointing."""
    from library.testing import full_size_header
    from library.training.checks.estimates import estimated_bytes
    from library.training.options import parse_options

    words = ["--mixed_precision=fp16", "--network_train_unet_only", "--gradient_checkpointing"]
    options = parse_options([*words, *([] if name == PLAIN else [f"--base_dtype={name}"])])
    return estimated_bytes(options, full_size_header(), 1, (512, 512)) / 2**30


# ---------------------------------------------------------------- quality


@torch.no_grad()
def output_errors(names: list[str]) -> dict[str, float]:
    """|packed - plain| / |plain| over the U-Net's outputs, by format."""
    import numpy as np
    from PIL import Image

    from library.diffusion.process import NoiseProcess
    from library.models.clip import encode_text, tokenize
    from library.models.loading import load_stable_diffusion
    from tools.demo import BASE_MODEL

    model = load_stable_diffusion(str(BASE_MODEL))
    files = sorted((ROOT / "assets" / "example" / "lineart").glob("*.webp"))[:IMAGES]
    pixels = [np.asarray(Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.BOX)) for file in files]
    images = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    context = encode_text(model.text_encoders[0], tokenize(model.tokenizers, captions)["ids"])
    generator = torch.Generator().manual_seed(1)
    latents = model.vae.encode(images).latent_dist.sample(generator) * model.vae.config.scaling_factor
    noise, process = torch.randn(latents.shape, generator=generator), NoiseProcess()

    def outputs(unet: torch.nn.Module) -> torch.Tensor:
        times = [torch.full((len(files),), timestep) for timestep in TIMESTEPS]
        return torch.stack([unet(process.add_noise(latents, noise, t), t, encoder_hidden_states=context).sample for t in times])

    plain, errors = outputs(model.denoiser), {PLAIN: 0.0}
    for name in names:
        packed = copy.deepcopy(model.denoiser)
        pack_weights(packed, name)
        errors[name] = ((outputs(packed) - plain).norm() / plain.norm()).item()
    return errors


# ---------------------------------------------------------------- training


def training_losses(name: str, seed: int, steps: int, folder: Path) -> tuple[float, float]:
    """Validation loss at the end, and mean training loss of the last fifth, of one run of the demo's command."""
    from accelerate.state import AcceleratorState

    from library.training.entry import train
    from library.training.loop import Listener
    from library.training.options import parse_options
    from tools import demo

    command = demo.training_command(demo.BASE_MODEL, folder, steps)
    words = command[command.index("train_network.py") + 1 :]
    words += [f"--seed={seed}", "--validation_split=0.2", "--validation_seed=1", f"--validate_every_n_steps={steps}"]
    words += [] if name == PLAIN else [f"--base_dtype={name}"]
    begun = []

    class Watch(Listener):
        def begin(self, run) -> None:
            begun.append(run)

    AcceleratorState._reset_state(reset_partial_state=True)  # one process, many runs
    train(parse_options(words), [Watch()])
    (run,) = begun
    return run.validator.record.history[-1][1], statistics.mean(run.losses.values[-max(1, steps // 5) :])


# ---------------------------------------------------------------- tables


def memory_table(names: list[str]) -> list[str]:
    lines = [
        "| format | U-Net, MB | text encoder, MB | bits a number of the U-Net | estimate, GiB |",
        "|---|---:|---:|---:|---:|",
    ]
    numbers = model_bytes(PLAIN)[0] / 2
    for name in [PLAIN, *names]:
        unet, text = model_bytes(name)
        lines.append(f"| {name} | {unet / 1e6:.0f} | {text / 1e6:.0f} | {unet * 8 / numbers:.2f} | {estimate(name):.2f} |")
    return lines


def quality_table(names: list[str]) -> list[str]:
    errors = output_errors(names)
    return ["| format | error of the U-Net's output |", "|---|---:|", *(f"| {name} | {errors[name]:.2%} |" for name in errors)]


def training_table(names: list[str], seeds: list[int], steps: int) -> list[str]:
    """A row for each format: means over the seeds, and how far each seed is from the unpacked run of that seed."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [PLAIN, *names]:
            for seed in seeds:
                found[name, seed] = training_losses(name, seed, steps, Path(folder) / f"{name}{seed}")
                print(name, seed, found[name, seed], file=sys.stderr, flush=True)
    lines = [
        f"{steps} steps of 4 images, seeds {', '.join(map(str, seeds))}; float32; {conditions()}.", "",
        "| format | validation loss | loss of the last fifth | difference of the validation loss, by seed |",
        "|---|---:|---:|---|",
    ]  # fmt: skip
    for name in [PLAIN, *names]:
        validation, training = (statistics.mean(found[name, seed][part] for seed in seeds) for part in (0, 1))
        differences = ", ".join(f"{found[name, seed][0] / found[PLAIN, seed][0] - 1:+.2%}" for seed in seeds)
        lines.append(f"| {name} | {validation:.5f} | {training:.5f} | {differences} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--only", nargs="+", default=["memory", "quality", "training"], choices=["memory", "quality", "training"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is fetched
    tables = {
        "memory": lambda: memory_table(arguments.formats),
        "quality": lambda: quality_table(arguments.formats),
        "training": lambda: training_table(arguments.formats, arguments.seeds, arguments.steps),
    }
    for title in arguments.only:
        lines = tables[title]()
        print("\n".join(lines), flush=True)
        write_parts(arguments.out, "base_dtype.py", __doc__, {title: lines})


if __name__ == "__main__":
    main()
