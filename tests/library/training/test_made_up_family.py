"""The proof of the seam: a family that exists in this file alone trains, saves, merges and draws.

It has two text encoders whose states stand side by side, a vector from the second one, a U-Net that is named otherwise in LoRA
files, names of its own in single files, sizes that count, and latents of another scale and shift.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from small_runs import Recorder

from library.formats.compvis import PartLayout
from library.formats.families import Records
from library.formats.names import UNET_PREFIX, VAE_PREFIX
from library.generation.extras.networks import Networks
from library.generation.options import NetworkOptions
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.spec import PromptSpec
from library.models import registry, sd1
from library.models.clip import encode_text, text_config
from library.models.family import Conditioning, Family, LatentSpace, TextRules
from library.models.loading import load_stable_diffusion, read_header
from library.models.saving import save_stable_diffusion
from library.models.unet import unet_config
from library.models.vae import KL_VAE, read_vae_config, vae_config
from library.testing import small_model
from tests.library.training.small_runs import tensors_of

SPACE = LatentSpace(scale=0.4, shift=0.25)
WIDTHS = (64, 32)  # of the text encoders
SEEN: list[torch.Tensor] = []  # the sizes that reached the denoiser


def encode(model, tokens, clip_skip):
    numbered = zip(model.text_encoders, ("", "_2"), strict=True)
    states = [encode_text(encoder, tokens[f"ids{end}"], clip_skip, tokens.get(f"weights{end}")) for encoder, end in numbered]
    return Conditioning({"context": torch.cat(states, dim=-1), "pooled": states[1].mean(dim=1)})


def predict(model, noisy, t, conditioning, sizes):
    assert sizes.shape == (len(noisy), 6)
    SEEN.append(sizes)
    predicted = model.denoiser(noisy, t, encoder_hidden_states=conditioning["context"]).sample
    return predicted + 0.1 * conditioning["pooled"].mean(dim=1).view(-1, 1, 1, 1)


def path_in_files(path: str) -> str | None:
    return f"net.{path}" if path.startswith(("down_blocks", "mid_block", "up_blocks")) else None


_UNET, _TEXT = sd1.FAMILY.parts[0], sd1.FAMILY.text_parts[0]
MADE_UP = Family(
    name="made-up",
    title="Made-up Diffusion",
    parts=(
        replace(_UNET, file_paths=lambda module: path_in_files),
        replace(KL_VAE, read_config=partial(read_vae_config, latents=SPACE)),
        _TEXT,
        replace(_TEXT, name="text_encoder_2"),
    ),
    layout=(
        PartLayout("unet", "unet", (UNET_PREFIX,)),
        PartLayout("vae", "vae", (VAE_PREFIX,)),
        PartLayout("text_encoder", "clip", ("readers.0.",)),
        PartLayout("text_encoder_2", "clip", ("readers.1.",)),
    ),
    pipeline="MadeUpPipeline",
    owns_folder=lambda configs: "text_encoder_2" in configs,
    text=TextRules(
        ("<|endoftext|>", "!"), encode, lambda model, tokens: {"context": (tokens, sum(WIDTHS)), "pooled": (WIDTHS[1],)}
    ),
    predict=predict,
    records=Records(False, {"epsilon": "made_up_v0", "v": "made_up_v0_v"}, {"epsilon": "made-up", "v": "made-up"}),
    latents=SPACE,
)
SPEC = PromptSpec("a red square", "blue", width=64, height=64, seed=5, steps=3)


def configs() -> dict:
    return {
        "unet": unet_config((32, 64), context_width=sum(WIDTHS)),
        "vae": vae_config((32, 32, 32, 32), layers=1, latents=SPACE),
        "text_encoder": text_config(WIDTHS[0], 2),
        "text_encoder_2": text_config(WIDTHS[1], 1),
    }


@pytest.fixture
def base_model(monkeypatch, tmp_path):
    """Its single file; `run` of conftest.py trains on it. The family is known for the length of a test."""
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, MADE_UP))
    SEEN.clear()
    model = small_model(MADE_UP, configs(), seed=3)
    with torch.no_grad():
        model.vae.quant_conv.weight *= 0.4
    save_stable_diffusion(model, tmp_path / "made-up.safetensors")
    return tmp_path / "made-up.safetensors"


def test_files_and_folders_there_and_back(base_model, tmp_path):
    model = load_stable_diffusion(str(base_model), v2=False)
    save_stable_diffusion(model, tmp_path / "folder")
    again = load_stable_diffusion(str(tmp_path / "folder"))
    assert again.family is model.family is MADE_UP and again.latents == model.latents == SPACE
    for part in MADE_UP.parts:
        ours, theirs = (m.parts[part.name].state_dict() for m in (model, again))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [t.pad_token_id for t in again.tokenizers] == [49407, 0]
    header = read_header(str(base_model))
    assert {name: len(shapes) for name, shapes in header.shapes.items()} == {
        name: len(shapes) for name, shapes in read_header(str(tmp_path / "folder")).shapes.items()
    }


@pytest.mark.parametrize("words", [["--cache_latents"], ["--network_train_unet_only", "--gradient_checkpointing"]])
def test_it_trains_is_saved_merged_and_draws(base_model, run, words, tmp_path):
    recorder = Recorder()
    done = run("--max_train_steps=6", "--network_dim=4", "--learning_rate=1e-2", *words, recorder)
    trained = recorder.runs[0]
    assert (trained.data.train.texts is not None) is ("--network_train_unet_only" in words)
    assert all(sizes.tolist() == [[64, 64, 0, 0, 64, 64]] for sizes in SEEN)
    assert done.metadata()["ss_base_model_version"] == "made_up_v0"
    assert done.metadata()["modelspec.architecture"] == "made-up/lora"

    file = done.folder / "mine.safetensors"
    weights = tensors_of(file)
    modules = {key.partition(".")[0] for key in weights}
    count = {prefix: sum(name.startswith(prefix) for name in modules) for prefix in ("lora_te1_", "lora_te2_", "lora_unet_net_")}
    te1, te2 = (0, 0) if "--network_train_unet_only" in words else (12, 6)
    assert (
        count == {"lora_te1_": te1, "lora_te2_": te2, "lora_unet_net_": len(modules) - te1 - te2} and count["lora_unet_net_"] > 70
    )
    changed = {name for name in modules if weights[f"{name}.lora_up.weight"].any()}
    assert {name.split("_")[1] for name in changed} == (
        {"unet"} if "--network_train_unet_only" in words else {"te1", "te2", "unet"}
    )

    def draw(**how) -> torch.Tensor:
        model = load_stable_diffusion(str(base_model))
        networks = Networks.load(model, NetworkOptions(network_weights=[str(file)], **how)) if how else None
        return torch.cat([torch.frombuffer(bytearray(m.image.tobytes()), dtype=torch.uint8) for m in
                          Pipeline(model, GenerateSettings(networks=networks)).generate([SPEC])])  # fmt: skip

    plain, applied, merged = draw().int(), draw(network_merge=False).int(), draw(network_merge=True).int()
    assert (applied - merged).abs().max() <= 1 < (applied - plain).abs().max()
