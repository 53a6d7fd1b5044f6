"""`--base_weights` with every kind of adapter: the model that is trained on is the one that merge_lora.py makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kind_files import CONV, GLORA_3X3, KINDS, LAYER, NORM, TUCKER, random
from tool_files import save_lora

from library.models.loading import load_stable_diffusion
from library.models.modules import weights_of
from library.models.saving import save_stable_diffusion
from library.testing import small_stable_diffusion
from library.training.loop import Listener
from networks import merge_lora

WIDTH = 96  # of the middle of the model that is trained on
LAYER_NAMES = ["attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "attn2_to_q", "attn2_to_out_0"]


@pytest.fixture
def base_model(tmp_path) -> Path:
    """A U-Net of three levels: its middle and the first attention on the way up are WIDTH wide."""
    path = tmp_path / "model.safetensors"
    save_stable_diffusion(small_stable_diffusion(unet_channels=(32, WIDTH, WIDTH), vae_channels=(32, 32, 32, 32)), path)
    return path


class Keeper(Listener):
    """Keeps the weights of the model at the start of the run."""

    def begin(self, run) -> None:
        self.weights = {name: {key: t.clone() for key, t in weights_of(part).items()} for name, part in run.model.parts.items()}


def every_kind() -> dict[str, torch.Tensor]:
    """A file with a layer of each kind, and changes of a norm layer and a bias."""
    blocks = [LAYER.removesuffix("attn1_to_q"), LAYER.replace("mid_block", "up_blocks_1").removesuffix("attn1_to_q")]
    layers = iter(block + name for block in blocks for name in LAYER_NAMES)
    kernels = {TUCKER: CONV.replace("conv1", "conv2"), GLORA_3X3: CONV.replace("resnets_0", "resnets_1")}
    tensors = random({"w_norm": (WIDTH,), "b_norm": (WIDTH,)}, NORM) | random({"diff_b": (WIDTH,)}, CONV)
    for kind, shapes in KINDS.items():
        wide = {name: tuple(_wider(size) for size in shape) for name, shape in shapes.items()}
        tensors |= random(wide, kernels.get(kind) or next(layers))
    return tensors


def _wider(size: int) -> int:
    return {64: WIDTH, 32: WIDTH // 2, 9 * 64: 9 * WIDTH}.get(size, size)


def test_every_kind_is_merged_before_training(run, base_model, tmp_path):
    tensors = every_kind()
    for key in list(tensors):  # blocks of 8 x 8 for 64 wide layers
        if key.endswith("oft_blocks"):
            shape = list(tensors[key].shape)
            shape[-3] = WIDTH // 8
            tensors[key] = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.1
    file, merged = save_lora(tmp_path / "kinds.safetensors", tensors), tmp_path / "merged.safetensors"
    merge_lora.main(["--sd_model", str(base_model), "--save_to", str(merged), "--models", file, "--ratios", "-5e-1"])
    keeper = Keeper()
    run("--max_train_steps=1", keeper, f"--base_weights={file}", "--base_weights_multiplier", "-5e-1")
    expected, plain = (load_stable_diffusion(str(path)) for path in (merged, base_model))
    changed = 0
    for name, part in expected.parts.items():
        for key, value in weights_of(part).items():
            torch.testing.assert_close(keeper.weights[name][key], value, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")
            changed += not torch.equal(value, weights_of(plain.parts[name])[key])
    assert changed == len(KINDS) + 3
