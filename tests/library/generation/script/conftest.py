"""A small model and LoRAs on disk, once for the whole session, and a function that runs gen_img_diffusers.py on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.generation import loading
from library.generation.options import parse_options
from library.generation.session import run
from library.models.saving import save_stable_diffusion
from library.testing import small_stable_diffusion
from networks.lora import create_network


@pytest.fixture(scope="session")
def gen_files(tmp_path_factory) -> Path:
    """model.safetensors, the Diffusers folder model, and LoRAs in out."""
    folder = tmp_path_factory.mktemp("gen")
    model = small_stable_diffusion(unet_channels=(32, 32, 64, 64), vae_channels=(32, 32, 32, 32), text_width=32)
    save_stable_diffusion(model, folder / "model.safetensors")
    save_stable_diffusion(model, folder / "model")
    for seed, name in enumerate(("mine", "style", "mine-000002", "mine-000004")):
        lora = create_network(1.0, 2, 2.0, model.vae, model.text_encoders[0], model.denoiser)
        generator = torch.Generator().manual_seed(seed)
        for parameter in lora.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        lora.save_weights(folder / "out" / f"{name}.safetensors", None, {"ss_seed": str(seed)})
    return folder


@dataclass
class Drawn:
    """What a run of the script left behind."""

    code: int
    folder: Path

    @property
    def files(self) -> list[Path]:
        """Its images in the order of their names; sheets are not among them."""
        return sorted(path for path in self.folder.glob("*.png") if not path.name.startswith("sheet_"))

    @property
    def texts(self) -> list[dict[str, str]]:
        """The text fields of each."""
        return [Image.open(path).text for path in self.files]

    def pixels(self) -> list[bytes]:
        return [Image.open(path).tobytes() for path in self.files]


@pytest.fixture(scope="session")
def loaded_models() -> dict:
    """Models that were read before, by what was asked for; reading one takes half of a run's time."""
    return {}


@pytest.fixture
def shared_models(monkeypatch, loaded_models) -> None:
    """Runs share a model that was read before, unless something is attached to it that changes it."""
    load_pipeline, load_model = loading.load_pipeline, loading.load_model

    def load_once(model, speed):
        key = (model, speed)
        if key not in loaded_models:
            loaded_models[key] = load_model(model, speed)
        return loaded_models[key]

    def load(options):
        network = options.network
        changes = network.network_weights or network.lora_dir or options.model.textual_inversion_embeddings
        with monkeypatch.context() as patched:
            if not (changes or options.speed.vae_slices):
                patched.setattr(loading, "load_model", load_once)
            return load_pipeline(options)

    monkeypatch.setattr(loading, "load_pipeline", load)


@pytest.fixture
def draw(gen_files, tmp_path, shared_models) -> Callable[..., Drawn]:
    """`draw("--prompt=a cat")` runs the script in this process, each time into a new folder unless --outdir is given."""
    count = iter(range(100))

    def start(*words: str) -> Drawn:
        given = [word.split("=", 1)[1] for word in words if word.startswith("--outdir=")]
        folder = Path(given[-1]) if given else tmp_path / f"drawn{next(count)}"
        small = ["--W=64", "--H=64"] if not any(word.startswith(("--image_path", "--W")) for word in words) else []
        options = [f"--ckpt={gen_files / 'model.safetensors'}", "--steps=2", *small, f"--outdir={folder}", *words]
        return Drawn(run(parse_options(options)), folder)

    return start
