"""Small files for the tests of the tools: checkpoints of the small model, and LoRAs for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.formats.compvis import join_compvis
from library.models.family import Model
from library.models.modules import weights_of
from library.testing import small_sdxl, small_stable_diffusion
from networks.lora import find_layers

NETWORKS = Path(__file__).parents[1] / "networks"
NETWORK_TOOLS = sorted(
    path.stem for path in NETWORKS.glob("*.py") if path.read_text(encoding="utf-8").endswith("    run_tool(main)\n")
)
CHANNELS = dict(unet_channels=(32, 64, 64, 64), vae_channels=(32, 32, 32, 32))
EXTRAS = {"betas": torch.linspace(0, 1, 9), "model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}


@cache
def small_model(family: str = "sd1", seed: int = 0) -> Model:
    return small_stable_diffusion(seed=seed, family=family, **CHANNELS)


small_sdxl_model = cache(small_sdxl)


def checkpoint_tensors(model: Model, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a CompVis file of the model holds, with a few extra keys, as files in the wild have them."""
    joined = join_compvis({name: weights_of(module) for name, module in model.parts.items()}, model.family.layout)
    return {k: v.to(dtype).contiguous() for k, v in joined.items()} | EXTRAS


def layers_of(model: Model) -> dict[str, torch.nn.Module]:
    return find_layers(*model.for_networks(), conv3x3=True)


def lora_tensors(
    model: Model, rank: int = 4, alpha: float | None = 2.0, seed: int = 0, conv3x3: bool = True, only: str = ""
) -> dict[str, Tensor]:
    """A random LoRA for the model, in kohya's layout."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in layers_of(model).items():
        is_conv = layer.weight.dim() == 4
        if only not in name or (is_conv and layer.weight[0, 0].numel() > 1 and not conv3x3):
            continue
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *layer.weight.shape[1:], generator=generator) * 0.05
        up = torch.randn(len(layer.weight), rank, generator=generator) * 0.05
        tensors[f"{name}.lora_up.weight"] = up[:, :, None, None] if is_conv else up
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def save_lora(path: Path, tensors: dict[str, Tensor], **metadata: str) -> str:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata or None)
    return str(path)


def products(tensors: dict[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
    """The full addition of every module, flattened, in float64; no alpha is the rank."""
    result = {}
    for key in tensors:
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            up, down = tensors[f"{name}.lora_up.weight"].double().flatten(1), tensors[key].double().flatten(1)
            alpha = float(tensors.get(f"{name}.alpha", torch.tensor(float(len(down)))))
            result[name] = factor * alpha / len(down) * up @ down
    return result


def total(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part[name] for part in parts if name in part) for name in names}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def load(path: Path) -> dict[str, Tensor]:
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return content.get("state_dict", content)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
