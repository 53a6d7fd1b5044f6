"""Train a LoRA on the example images and draw with and without it: what `python quickstart.py` runs."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this file may be started from anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is fetched

from library.entry import run_entry  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.files import atomic_write  # noqa: E402
from library.tools.command import Parser, path_text  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image

    from library.generation.prompts.spec import PromptSpec
    from library.models.family import Model

BASE_MODEL = ROOT / "assets" / "base-model"  # a Diffusers folder; assets/MODEL_CARD.md
DATASET = ROOT / "assets" / "example" / "dataset.toml"
HELD_OUT = ROOT / "assets" / "example-heldout"
OUTPUT = ROOT / "output" / "demo"
NAME = "lineart"

STEPS = 300
SEED = 1
DRAWING = {"steps": 20, "scale": 4.0, "sampler": "ddim"}


def main() -> int:
    args = parse_arguments()
    output = Path(args.output).resolve()
    held_out = dict(list(held_out_images().items())[: args.images])
    resolution = resolution_of_dataset()
    command = training_command(BASE_MODEL, output, args.steps)
    lora = output / f"{NAME}.safetensors"

    print(
        f"1. Training a LoRA for {args.steps} steps on the 150 line drawings in assets/example; about 2 minutes on 2 CPU cores."
    )
    print(flush=True)
    train(command)

    print(f"\n2. Drawing {len(held_out)} images that were not trained on, without and with the LoRA.", flush=True)
    started = time.perf_counter()
    sheet = output / "contact-sheet.png"
    draw_sheet(BASE_MODEL, lora, held_out, resolution, sheet)
    print(f"   Done in {time.perf_counter() - started:.0f} s.\n")
    report(output, lora, sheet, command)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = "quickstart.py"
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--output", type=path_text, default=OUTPUT, help="folder for the results")
    parser.add_argument("--images", type=int, default=8, help="images to draw, 1 to 8")
    args = parser.parse_args()
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: at least one step is needed")
    if args.images < 1:
        raise UserError(f"--images {args.images}: at least one image is needed")
    return args


def resolution_of_dataset() -> int:
    """Width and height, pixels, that the example dataset is trained at."""
    from library.data.config import datasets_from_file
    from library.data.config_keys import DatasetDefaults

    return datasets_from_file(DATASET, DatasetDefaults())[0].resolution[0]


def held_out_images() -> dict[str, Path]:
    """Caption -> image of the training style that no training sees."""
    return {path.with_suffix(".txt").read_text(encoding="utf-8").strip(): path for path in sorted(HELD_OUT.glob("*.webp"))}


def training_command(base: Path, output: Path, steps: int) -> list[str]:
    """The command as a reader would type it in the project's folder."""
    return [
        "accelerate", "launch", "--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "train_network.py",
        f"--pretrained_model_name_or_path={from_root(base)}",
        f"--dataset_config={from_root(DATASET)}",
        f"--output_dir={from_root(output)}",
        f"--output_name={NAME}",
        "--save_model_as=safetensors",
        "--network_module=networks.lora",
        "--network_dim=32",
        "--network_alpha=32",
        "--network_args", "conv_dim=16", "conv_alpha=16",
        f"--max_train_steps={steps}",
        "--learning_rate=2e-3",
        "--lr_scheduler=cosine",
        "--min_snr_gamma=5",
        "--optimizer_type=AdamW",
        "--mixed_precision=no",
        "--cache_latents",
        "--vae_batch_size=16",
        "--max_data_loader_n_workers=0",
        f"--seed={SEED}",
    ]  # fmt: skip


def from_root(path: Path) -> str:
    """Relative to the project's folder where it lies inside, so that the command is short."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def as_typed(command: list[str]) -> str:
    """The command quoted for this system's usual shell, one option a line."""
    quote, line_end = (powershell_quoted, " `\n") if os.name == "nt" else (shlex.quote, " \\\n")
    words = [quote(word) for word in command]
    first_option = next((i for i, word in enumerate(command) if word.startswith("--pretrained")), len(words))
    return line_end.join([" ".join(words[:first_option]), *(f"  {word}" for word in words[first_option:])])


def powershell_quoted(word: str) -> str:
    safe = all(letter.isalnum() or letter in "-_=.:/\\" for letter in word)
    return word if safe else "'" + word.replace("'", "''") + "'"


def train(command: list[str]) -> None:
    """Run the command with this Python, in the project's folder. Ctrl-C reaches the trainer alone, which saves before it ends."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *command[2:]]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    process = subprocess.Popen(launcher, cwd=ROOT, env=environment, start_new_session=os.name != "nt")
    try:
        code = process.wait()
    except KeyboardInterrupt:
        print("\nstopping after this step", flush=True)
        interrupt_trainer(process.pid)
        process.wait()
        raise
    if code:
        raise UserError("the training did not end well; its message is above")


def interrupt_trainer(launcher: int) -> None:
    """Pass Ctrl-C on to train_network.py under `accelerate launch`. On Windows the console has done so already."""
    if os.name == "nt":
        return
    import psutil

    for child in psutil.Process(launcher).children():
        child.send_signal(signal.SIGINT)


def draw_sheet(base: Path, lora: Path, held_out: dict[str, Path], resolution: int, sheet: Path) -> None:
    """Rows: the captions; columns: without and with the LoRA, from the same noise, and the held-out image itself."""
    from PIL import Image

    from library.generation.prompts.spec import PromptSpec
    from library.models.loading import load_stable_diffusion
    from library.sheets import contact_sheet

    model = load_stable_diffusion(str(base))
    specs = [
        PromptSpec(prompt=caption, width=resolution, height=resolution, seed=SEED + number, **DRAWING)
        for number, caption in enumerate(held_out)
    ]
    without = draw(model, specs)
    add_lora(model, lora)
    with_lora = draw(model, specs)
    real = [Image.open(path) for path in held_out.values()]
    image = contact_sheet(
        [list(row) for row in zip(without, with_lora, real, strict=True)],
        row_labels=list(held_out),
        column_labels=["without the LoRA", "with the LoRA", "the training style (real)"],
        cell=128,
    )
    with atomic_write(sheet) as temporary:
        image.save(temporary)


def draw(model: Model, specs: list[PromptSpec]) -> list[Image.Image]:
    from library.generation.pipeline.pipeline import Pipeline
    from library.generation.pipeline.settings import GenerateSettings

    return [made.image for made in Pipeline(model, GenerateSettings(batch_size=len(specs))).generate(specs)]


def add_lora(model: Model, lora: Path) -> None:
    """Add the LoRA to the model's weights at full strength."""
    from networks.lora import create_network_from_weights

    network, weights = create_network_from_weights(
        1.0, lora, model.vae, model.text_encoders[0], model.denoiser, for_inference=True
    )
    network.merge_to(model.text_encoders[0], model.denoiser, weights)


def report(output: Path, lora: Path, sheet: Path, command: list[str]) -> None:
    activate = r".venv\Scripts\Activate.ps1" if os.name == "nt" else "source .venv/bin/activate"
    quote = powershell_quoted if os.name == "nt" else shlex.quote
    print(f"LoRA:          {lora}")
    print(f"Contact sheet: {sheet}")
    print(f"Loss plot:     {output / f'{NAME}-loss.png'}")
    print(f"Page:          {output / f'{NAME}.html'} (open it in a browser)\n")
    print("The training was this command; change it and go on from here:\n")
    print(f"cd {quote(str(ROOT))}\n{activate}\n{as_typed(command)}")


if __name__ == "__main__":
    run_entry(main)
