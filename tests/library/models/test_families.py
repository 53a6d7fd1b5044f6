"""Families: detection, what is read from shapes, views for networks; nothing outside library/models asks which it is."""

from __future__ import annotations

import csv
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.models import sd1, sd2
from library.models.clip import inner_text_model, tokenize
from library.models.family import Conditioning, renamed_view
from library.models.loading import read_header
from library.models.registry import FAMILIES, by_name, check_v2
from library.models.unet import empty_unet, read_unet_config, unet_config
from library.testing import small_sdxl, small_stable_diffusion
from networks.lora import find_layers

ROOT = Path(__file__).resolve().parents[3]


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("kind", ["model.safetensors", "model.ckpt", "folder"])
def test_family_and_shapes_are_known_before_weights_are_read(small_models, saved_models, v2, kind):
    header = read_header(str(saved_models[v2, kind]), v2)
    assert header.family is (sd2.FAMILY if v2 else sd1.FAMILY)
    assert header.shapes["unet"] == shapes_of(small_models[v2].denoiser)
    assert header.shapes["vae"] == shapes_of(small_models[v2].vae)
    with pytest.raises(UserError, match="leave out --v2" if not v2 else "add --v2"):
        read_header(str(saved_models[v2, kind]), not v2)


def test_a_family_goes_to_another_process_by_its_name():
    assert all(pickle.loads(pickle.dumps(family)) is family is by_name(family.name) for family in FAMILIES)
    check_v2("m", sd1.FAMILY, False)


# ---------------------------------------------------------------- architecture from shapes

SDXL = {"heads": None, "linear_projection": True}
UNETS = {
    "SD 1": unet_config((32, 64, 96, 96), context_width=64),
    "depths by level, a vector, as SDXL": unet_config(
        (64, 128), context_width=96, attention=(False, True), depths={"transformer_layers_per_block": [1, 3]}, vector_width=1600,
        **SDXL,
    ),
    "no middle block": unet_config((64, 128), context_width=96, attention=(False, True), middle=None, **SDXL),
    "other depths upwards and within a level": unet_config(
        (64, 128, 128), context_width=96, attention=(False, True, True), vector_width=1600, middle=None,
        depths={
            "transformer_layers_per_block": [1, 2, 4],
            "reverse_transformer_layers_per_block": [[4, 4, 6], [2, 1, 1], 1],
        },
        **SDXL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNETS)
def test_a_u_net_is_built_again_from_its_shapes(name):
    config = UNETS[name]
    shapes = shapes_of(empty_unet(config))
    again = read_unet_config(shapes, heads=config["attention_head_dim"] if name == "SD 1" else None)
    assert shapes_of(empty_unet(again)) == shapes
    assert again.get("projection_class_embeddings_input_dim") == config.get("projection_class_embeddings_input_dim")


# ---------------------------------------------------------------- views


def test_networks_see_text_encoders_with_the_paths_of_files_and_the_u_net_itself(small_models):
    model = small_models[False]
    encoder, unet = model.for_networks()
    assert unet is model.denoiser
    layer = encoder.get_submodule("text_model.encoder.layers.1.mlp.fc2")
    assert isinstance(layer, nn.Linear) and layer in list(model.text_encoders[0].modules())
    assert type(encoder).__name__ == "CLIPTextModel" and model.for_networks()[0] is encoder


def test_a_view_holds_the_same_layers_under_other_paths():
    root = nn.Module()
    root.block = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    root.rest = nn.Linear(2, 2)
    view = renamed_view(root, lambda module: lambda path: None if path.startswith("rest") else path.replace("block", "a.0.b"))
    assert [path for path, _ in view.named_modules()] == ["", "a", "a.0", "a.0.b", "a.0.b.0", "a.0.b.1"]
    assert view.get_submodule("a.0.b.0") is root.block[0] and type(view.get_submodule("a.0.b")).__name__ == "Sequential"
    assert renamed_view(root, None) is root and renamed_view(root, lambda module: lambda path: path) is root


@pytest.mark.parametrize("file, v2", [("lora-keys-sd15.csv", False), ("lora-keys-sd2.csv", True)])
def test_layers_found_through_the_view_have_the_names_of_files(small_models, file, v2):
    with open(ROOT / "tests" / "data" / file, encoding="utf-8") as rows:
        known = {row["key"].partition(".")[0] for row in csv.DictReader(rows)}
    assert known.issuperset(find_layers(*small_models[v2].for_networks(), conv3x3=True))


def test_conditionings_are_moved_cut_and_joined():
    one = Conditioning({"context": torch.arange(12.0).view(2, 3, 2), "pooled": torch.ones(2, 4)})
    both = Conditioning.cat([one, one.to(torch.float64).to(torch.float32)])
    assert len(both) == 4 and torch.equal(both.rows([3])["context"], one.rows([1])["context"])
    assert [len(row) for row in both.split()] == [1] * 4 and torch.equal(list(both.split())[2]["pooled"], torch.ones(1, 4))


# ---------------------------------------------------------------- nobody else asks

ASKS = re.compile(r"family\.name\b|family (==|is not) |\bif [^#\n]*\bv2\b|\bv2\b[^#\n:=]* (if|else) ")


@pytest.mark.parametrize(
    "make, clip_skip, counts",
    [
        (small_stable_diffusion, None, [0]),
        (small_stable_diffusion, 2, [1]),
        (small_stable_diffusion, 3, [2]),
        (small_sdxl, None, [1, 0]),
        (small_sdxl, 2, [1, 0]),
    ],
)
def test_trap_38_layers_that_are_not_read_are_those_that_no_gradient_reaches(make, clip_skip, counts):
    model = make(text_layers=3)
    for encoder in model.text_encoders:
        encoder.requires_grad_(True)
    tokens = tokenize(model.tokenizers, ["a red square"])
    sum(value.square().sum() for value in model.encode_text(tokens, clip_skip).tensors.values()).backward()
    layers = [layer for encoder in model.text_encoders for layer in inner_text_model(encoder).encoder.layers]
    dead = [layer for layer in layers if layer.mlp.fc1.weight.grad is None or not layer.mlp.fc1.weight.grad.any()]
    unread = model.unread_layers(clip_skip)
    assert len(layers) == 3 * len(model.text_encoders) and unread == dead
    assert [sum(layer in unread for layer in layers[first : first + 3]) for first in range(0, len(layers), 3)] == counts


def test_no_code_outside_the_models_asks_which_family_it_is():
    rooms = [*(ROOT / "library" / room for room in ("data", "diffusion", "training", "generation")), *ROOT.glob("*.py")]
    files = [file for room in rooms for file in (room.rglob("*.py") if room.is_dir() else [room])]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if ASKS.search(line)
    ]
    assert found == []
