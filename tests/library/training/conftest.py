"""A small model on disk, a few images, and a function that trains on them through the real options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from small_runs import read_tokenizers_once

from library.command_line import option_names
from library.errors import unknown
from library.models.saving import save_stable_diffusion
from library.testing import small_stable_diffusion
from library.training.entry import train
from library.training.loop import Listener
from library.training.options import TrainNetworkOptions, parse_options
from library.training.outputs import summary

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module", autouse=True)
def tokenizers_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        read_tokenizers_once(patch.setattr)
        yield


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """A checkpoint of the small seeded model with a U-Net of two levels: a run does all that it does on four, in less time."""
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_stable_diffusion(small_stable_diffusion(unet_channels=(32, 64), vae_channels=(32, 32, 32, 32)), path)
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Four plain images of 64 x 64 px with captions."""
    folder = tmp_path_factory.mktemp("images")
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} square", encoding="utf-8")
    return folder


@dataclass
class Run:
    """What a run left behind."""

    code: int
    folder: Path

    def files(self) -> list[str]:
        """Names of everything directly in the output folder."""
        return sorted(path.name for path in self.folder.iterdir())

    def tensors(self, name: str = "mine.safetensors") -> dict[str, torch.Tensor]:
        with safe_open(self.folder / name, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}

    def metadata(self, name: str = "mine.safetensors") -> dict[str, str]:
        with safe_open(self.folder / name, "pt") as file:
            return file.metadata()


@pytest.fixture
def loss_plot() -> None:
    """For tests whose runs draw their loss plot, which takes as long as the rest of a small run."""


@pytest.fixture
def run(base_model, images, tmp_path, request, monkeypatch) -> Callable[..., Run]:
    """`run("--max_train_steps=2", ...)` trains in this process, on no worker processes, into a new folder each time.

    Listeners among the arguments are the run's.
    """
    count = iter(range(100))
    if "loss_plot" not in request.fixturenames:
        monkeypatch.setattr(summary, "try_loss_plot", lambda *args: "not drawn in tests")

    def start(*given: str | Listener, data: str | None = None) -> Run:
        words = [word for word in given if isinstance(word, str)]
        folder = tmp_path / f"out{next(count)}"
        AcceleratorState._reset_state(reset_partial_state=True)  # one process, many runs
        needed = [
            f"--pretrained_model_name_or_path={base_model}", data or f"--train_data_dir={images}", "--caption_extension=.txt",
            "--resolution=64", f"--output_dir={folder}", "--output_name=mine", "--network_module=networks.lora", "--seed=1",
            "--learning_rate=1e-3", "--max_data_loader_n_workers=0",
        ]  # fmt: skip
        return Run(train(parse_options([*needed, *words]), [one for one in given if isinstance(one, Listener)]), folder)

    return start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A mark `option` names options that there are."""
    known = option_names(TrainNetworkOptions)
    for item in items:
        for mark in item.iter_markers("option"):
            wrong = [name for name in mark.args if name not in known]
            if wrong:
                raise pytest.UsageError(f"{item.nodeid}: {unknown('option', wrong[0], known)}")
