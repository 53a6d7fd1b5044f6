"""Runs that take a tenth of a second: a model of two blocks that is made once and copied, and no loss plot.

What a run does is all there; only the frozen model is smaller than any that could be in a file.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open

from library.models import loading
from library.models.clip import load_tokenizer
from library.models.family import Model
from library.testing import header_of, small_stable_diffusion
from library.training import datasets, entry, setup
from library.training.checks import preflight
from library.training.loop import Listener
from library.training.options import parse_options
from library.training.outputs import summary
from library.training.setup import Run


@lru_cache(maxsize=1)
def two_blocks() -> Model:
    """The model: text encoder and VAE of the small one, a U-Net of two levels."""
    from diffusers import UNet2DConditionModel

    model = small_stable_diffusion(unet_channels=(32, 32, 64, 64), vae_channels=(32, 32, 32, 32), text_width=32, text_layers=1)
    torch.manual_seed(0)
    model.parts["unet"] = UNet2DConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
    ).requires_grad_(False).eval()  # fmt: skip
    return model


def copy_of_two_blocks() -> Model:
    """To train on. The tokenizers are shared: nothing changes them, and copying one takes longer than a step."""
    model = two_blocks()
    return copy.deepcopy(model, {id(tokenizer): tokenizer for tokenizer in model.tokenizers})


def image_folder(folder: Path, count: int = 5) -> Path:
    """Plain images of 64 x 64 pixels with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (64, 64), (40 * number % 256, 90 * number % 256, 255 - 40 * number % 256)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number}, plain, square", encoding="utf-8")
    return folder


def words_of_a_run(images: Path, output: Path, *words: str) -> list[str]:
    """The command line of a small run; later words beat earlier ones."""
    data = [] if any(word.startswith("--dataset_config") for word in words) else [f"--train_data_dir={images}"]
    return [
        "--pretrained_model_name_or_path=two-blocks", *data, "--caption_extension=.txt", "--resolution=64",
        f"--output_dir={output}", "--output_name=mine", "--network_module=networks.lora", "--network_dim=2", "--seed=1",
        "--learning_rate=1e-3", "--max_data_loader_n_workers=0", *words,
    ]  # fmt: skip


def use_two_blocks(replace: Callable[[object, str, object], None]) -> None:
    """Let runs work with that model; `replace` is monkeypatch.setattr, or setattr in a process that ends."""
    replace(preflight, "read_header", lambda *args: header_of(two_blocks()))
    replace(setup, "load_stable_diffusion", lambda *args, **kwargs: copy_of_two_blocks())
    replace(summary, "try_loss_plot", lambda *args: "not drawn in tests")
    replace(setup, "all_model_facts", lambda options: {})


read_once = cache(load_tokenizer)


def read_tokenizers_once(replace: Callable[[object, str, object], None]) -> None:
    """Reading CLIP's vocabulary, twice a run, takes longer than a small step; no training changes a tokenizer."""
    for module in (datasets, loading):
        replace(module, "load_tokenizer", read_once)


class Recorder(Listener):
    """Keeps the runs that begin."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def begin(self, run: Run) -> None:
        self.runs.append(run)


class AfterStep(Listener):
    """Calls `action(run)` after a step: after all of them, or after those of a number."""

    def __init__(self, action: Callable[[Run], object], step: int | None = None) -> None:
        self.action, self.step = action, step

    def begin(self, run: Run) -> None:
        self.run = run

    def after_step(self, progress, report) -> None:
        if self.step in (None, progress.step):
            self.action(self.run)


def train(words: list[str], *listeners: Listener) -> Run:
    """Train in this process and give the run as it was at the end."""
    recorder = Recorder()
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, many runs
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        entry.train(parse_options(words), [recorder, *listeners])
    return recorder.runs[0]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}
