"""Small good files that odd ones are made of, written once for a whole run: a checkpoint, LoRAs, a DyLoRA."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from library.formats.compvis import join_compvis
from library.models.clip import inner_text_model
from library.models.family import Model
from library.testing import small_stable_diffusion
from networks.lora import find_layers


@dataclass(frozen=True)
class Shelf:
    """Paths and tensors of the good files. The files must not change: `digests` tells."""

    folder: Path
    checkpoint: dict[str, Tensor]
    lora: dict[str, Tensor]

    @property
    def model(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def lora_file(self) -> Path:
        return self.folder / "lora.safetensors"

    def digests(self) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(self.folder.iterdir())}


def make_shelf(folder: Path) -> Shelf:
    folder.mkdir(parents=True)
    model = small_stable_diffusion(unet_channels=(32, 64), vae_channels=(32, 32, 32, 32), text_width=32, text_layers=1)
    shelf = Shelf(folder, _checkpoint(model), _lora(model))
    save_file(shelf.checkpoint, shelf.model)
    save_file(shelf.lora, shelf.lora_file, {"ss_network_dim": "2", "ss_network_alpha": "1.0", "ss_base_model_version": "sd_v1"})
    return shelf


def _checkpoint(model: Model) -> dict[str, Tensor]:
    text = {k: v for k, v in inner_text_model(model.text_encoders[0]).state_dict().items() if not k.endswith("position_ids")}
    parts = {"unet": model.denoiser.state_dict(), "vae": model.vae.state_dict(), "text_encoder": text}
    return {name: value.half().contiguous() for name, value in join_compvis(parts, model.family.layout).items()}


def _lora(model: Model, rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, layer in list(find_layers(model.text_encoders[0], model.denoiser, conv3x3=True).items())[::6]:
        up = torch.randn(len(layer.weight), rank, generator=generator)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *layer.weight.shape[1:], generator=generator)
        tensors[f"{name}.lora_up.weight"] = up[:, :, None, None] if layer.weight.dim() == 4 else up
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors
