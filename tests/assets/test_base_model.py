"""The base model that is shipped: small, a whole Stable Diffusion 1, and it draws what it is asked for."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from assets.make.names import prompt_of
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.spec import PromptSpec
from library.models.clip import encode_text, tokenize
from library.models.loading import load_stable_diffusion
from library.models.saving import save_stable_diffusion
from networks.lora import create_network

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "assets" / "base-model"


@pytest.fixture(scope="module")
def base():
    return load_stable_diffusion(str(BASE))


def test_forty_megabytes_hold_it_all_in_fp16():
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 40e6
    weights = {name: value for path in BASE.glob("*/*.safetensors") for name, value in load_file(path).items()}
    assert len(weights) > 900
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in weights.values() if value.is_floating_point())


def test_every_lora_name_of_stable_diffusion_1_exists(base):
    network = create_network(1.0, 4, 4, base.vae, base.text_encoders[0], base.denoiser, conv_dim="4", conv_alpha="1")
    found = {name.partition(".")[0] for name in network.state_dict()}
    with open(ROOT / "tests" / "data" / "lora-keys-sd15.csv", encoding="utf-8", newline="") as file:
        wanted = {row["key"].partition(".")[0] for row in csv.DictReader(file)}
    text_layers = base.text_encoders[0].config.num_hidden_layers  # fewer than the 12 of full size
    wanted = {
        name for name in wanted if not name.startswith("lora_te") or int(name.split("_layers_")[1].split("_")[0]) < text_layers
    }
    own = {"lora_unet_down_blocks_3_resnets_0_conv_shortcut"}  # the last level is narrower than the one before; 1.5's are alike
    assert found - own == wanted and len(wanted) > 250


def test_one_file_in_compvis_layout_holds_the_same_model(base, tmp_path):
    save_stable_diffusion(base, tmp_path / "base.safetensors", torch.float16)
    again = load_stable_diffusion(str(tmp_path / "base.safetensors"))
    for part in ("unet", "vae", "text_encoder"):
        first, second = base.parts[part].state_dict(), again.parts[part].state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_diffusers_loads_it_as_it_is(base):
    torch.manual_seed(0)
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(BASE, local_files_only=True).to(torch.float32)
    prompt = prompt_of("3d", "hot dog")
    context, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    ids = tokenize(base.tokenizers, [prompt])["ids"]
    latents = torch.randn(1, 4, 8, 8)
    ours = base.denoiser(latents, torch.tensor([500]), encoder_hidden_states=encode_text(base.text_encoders[0], ids)).sample
    torch.testing.assert_close(pipeline.unet(latents, 500, context).sample, ours)


def test_it_draws_what_the_prompt_says(base):
    """Of each name two images from different noise: each is nearer to its own than to any other name's."""
    names = ("banana", "umbrella", "guitar", "doughnut")
    specs = [
        PromptSpec(prompt=prompt_of("3d", name), seed=seed, width=64, height=64, steps=10, scale=4.0, sampler="ddim")
        for seed in (1, 2)
        for name in names
    ]
    images = np.stack(
        [np.asarray(made.image, dtype=float) for made in Pipeline(base, GenerateSettings(batch_size=8)).generate(specs)]
    )
    distances = np.abs(images[:4, None] - images[None, 4:]).mean(axis=(2, 3, 4))
    assert (distances.argmin(axis=0) == np.arange(4)).all() and (distances.argmin(axis=1) == np.arange(4)).all()
    assert np.ptp(images, axis=(1, 2, 3)).min() > 60  # something on white
