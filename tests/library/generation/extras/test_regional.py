"""library/generation/extras/regional.py: sub-prompts with networks of their own in parts of the image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from library.errors import UserError
from library.generation.extras.networks import Networks
from library.generation.extras.regional import Regions
from library.generation.options import NetworkOptions
from library.generation.pipeline.encoding import PromptCache
from library.generation.pipeline.image_state import prepare
from library.generation.pipeline.latents import LatentSampler
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.spec import DeepShrink, PromptSpec, split_regions
from networks import lora

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SPEC = PromptSpec("a cat AND a dog", "blurry", width=64, height=64, seed=7, scale=5.0, steps=2)
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def write_lora(path, model, seed):
    torch.manual_seed(seed)
    network = lora.create_network(1.0, 2, 2, None, model.text_encoders[0], model.denoiser, conv_dim="2", conv_alpha="2")
    for part in network.loras:
        torch.nn.init.normal_(part.lora_up.weight, std=0.15)
    network.save_weights(path, torch.float32, {})
    return str(path)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("regional")
    with torch.random.fork_rng():
        return [write_lora(folder / f"{seed}.safetensors", model, seed) for seed in (1, 2)]


@pytest.fixture
def load(model):
    loaded = []

    def run(files, *multipliers, **options):
        loaded.append(Networks.load(model, NetworkOptions(network_weights=files, network_mul=list(multipliers), **options)))
        return loaded[-1]

    yield run
    for networks in loaded:
        networks.close()


def colours(path, *colours):
    """An image of vertical stripes."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    for number, colour in enumerate(colours):
        pixels[:, 64 * number // len(colours) :] = colour
    Image.fromarray(pixels).save(path)
    return path


RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def test_sub_prompts_are_divided_at_the_word_in_capitals():
    assert split_regions("a cat AND a dog AND  sky") == ["a cat", "a dog", "sky"]
    assert split_regions("cats and dogs, AND") == ["cats and dogs, AND"]


def test_one_region_over_everything_is_the_network_as_usual(model, files, load, latents_of, tmp_path):
    """Without guidance, as the network does not act on the negative prompt."""
    spec = replace(SPEC, prompt="a cat", scale=1.0)
    networks = load(files[:1], 0.8)
    usual = latents_of(model, [spec], networks=networks)[0]
    regions = Regions.load(colours(tmp_path / "mask.png", RED), networks)
    torch.testing.assert_close(latents_of(model, [spec], networks=networks, regions=regions)[0], usual, rtol=2e-3, atol=2e-3)
    networks.close()
    assert (latents_of(model, [spec])[0] - usual).abs().max() > 0.1


def test_cross_attention_is_mixed_as_documented(model, files, load, tmp_path):
    networks = load(files, 1.0, 0.5)
    regions = Regions.load(colours(tmp_path / "mask.png", RED, GREEN), networks)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    attention = model.denoiser.get_submodule(name)
    width = attention.to_q.in_features
    torch.manual_seed(0)
    hidden, context = torch.randn(2, 64, width), torch.randn(3, 5, 64)  # negative and wanted; negative, cat and dog
    networks.set((1.0, 0.5))
    with torch.no_grad(), regions.acting(model.denoiser, 1, 2, 1, 8, 8):
        negative, mixed = attention(hidden, encoder_hidden_states=context)
    modules = {}
    for side in ("q", "k", "v", "out_0"):
        lora_name = f"lora_unet_{name.replace('.', '_')}_to_{side}"
        modules[side] = [loaded.network.get_submodule(lora_name) for loaded in networks.loaded]
    with torch.no_grad():
        masks = torch.zeros(2, 8, 8)
        masks[0, :, :4] = masks[1, :, 4:] = 1
        masks = masks.view(2, 64, 1)

        def plain(layer, rows):
            return F.linear(rows, layer.weight, layer.bias)

        def attend(rows, row_context, index):
            query = plain(attention.to_q, rows) + sum(
                mask * module(rows) for mask, module in zip(masks, modules["q"], strict=True)
            )
            key, value = plain(attention.to_k, row_context), plain(attention.to_v, row_context)
            if index is not None:
                key, value = key + modules["k"][index](row_context), value + modules["v"][index](row_context)
            heads = [part.view(1, -1, attention.heads, width // attention.heads).transpose(1, 2) for part in (query, key, value)]
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(1, -1, width)

        expected = torch.zeros(1, 64, width)
        for index in range(2):
            output = attend(hidden[1:], context[index + 1 : index + 2], index)
            expected += masks[index] * plain(attention.to_out[0], output) / (masks.sum(0) + 1e-4)
            expected += masks[index] * modules["out_0"][index](output)
        torch.testing.assert_close(mixed[None], expected, **CLOSE)
        unguided = plain(attention.to_out[0], attend(hidden[:1], context[:1], None))
        torch.testing.assert_close(negative[None], unguided, **CLOSE)


def test_each_network_sees_its_own_sub_prompt_alone(model, files, load, tmp_path):
    networks = load(files, 1.0, 0.5)
    regions = Regions.load(colours(tmp_path / "mask.png", RED, GREEN), networks)
    settings = GenerateSettings(networks=networks, regions=regions)
    state = prepare(0, SPEC, model, settings, PromptCache())
    guidance = LatentSampler(model, settings).guidance([state], (64, 64))
    assert networks.state == tuple(
        (loaded.number, strength) for loaded, strength in zip(networks.loaded, (1.0, 0.5), strict=True)
    )
    for text, strengths, rows in (
        ("a cat", (1.0, 0.0), guidance.positive["context"][0]), ("a dog", (0.0, 0.5), guidance.positive["context"][1]),
        ("blurry", (0.0, 0.0), guidance.negative["context"][0]),
    ):  # fmt: skip
        networks.set(strengths)
        torch.testing.assert_close(PromptCache().encode(model, [text], 1)["context"][0], rows, **CLOSE)


def test_a_network_changes_its_part_of_the_image_most(model, files, load, latents_of, tmp_path):
    networks = load(files)
    regions = Regions.load(colours(tmp_path / "mask.png", RED, GREEN), networks)
    both, first_only = latents_of(
        model, [replace(SPEC, steps=1, multipliers=strengths) for strengths in ((1.0, 1.0), (1.0, 0.0))],
        networks=networks, regions=regions,
    )  # fmt: skip
    change = (both - first_only).abs().mean(dim=(0, 1))
    assert change[4:].mean() > 1.2 * change[:4].mean()


def test_a_batch_makes_what_each_makes_alone_and_regions_leave_nothing_behind(model, files, load, latents_of, tmp_path):
    before = latents_of(model, [SPEC])[0]
    networks = load(files)
    regions = Regions.load(colours(tmp_path / "mask.png", RED, GREEN), networks)
    three = replace(SPEC, negative_scale=2.0, prompt="one AND two AND three")
    specs = [SPEC, replace(SPEC, prompt="a bird AND a fish", seed=8), three]
    together = latents_of(model, specs, networks=networks, regions=regions, batch_size=3)
    for one, spec in zip(together, specs, strict=True):
        torch.testing.assert_close(one, latents_of(model, [spec], networks=networks, regions=regions)[0], **CLOSE)
    networks.close()
    assert torch.equal(latents_of(model, [SPEC])[0], before)


def test_trap_6_6_the_fourth_network_and_empty_channels_act_everywhere(model, files, load, tmp_path):
    networks = load(files * 2, 0.2, 0.2, 0.2, 0.2)
    regions = Regions.load(colours(tmp_path / "mask.png", RED, GREEN), networks)
    masks = regions.masks(5, 8, 8, torch.device("cpu"))
    assert masks[0, 0, :, :4].eq(1).all() and masks[0, 0, :, 5:].eq(0).all()
    assert masks[1, 0, :, 4:].eq(1).all() and masks[2:].eq(1).all()
    spec = replace(SPEC, prompt="a AND b AND c AND d", steps=1)
    assert len(list(Pipeline(model, GenerateSettings(networks=networks, regions=regions)).generate([spec]))) == 1


def test_exact_colours(files, load, tmp_path):
    image = colours(tmp_path / "mask.png", (255, 0, 0), (0, 255, 0), (255, 255, 0), (254, 0, 0))
    masks = Regions.load(image, load(files), color_codes=3).masks(4, 64, 64, torch.device("cpu"))[:, 0, 0]
    assert [mask.view(4, 16).mean(1).tolist() for mask in masks] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]


def test_what_is_erased_belongs_to_no_region(files, load, tmp_path):
    image = Image.open(colours(tmp_path / "mask.png", RED, GREEN)).convert("RGBA")
    image.paste((255, 255, 255, 0), (0, 0, 16, 64))
    image.save(tmp_path / "mask.png")
    masks = Regions.load(tmp_path / "mask.png", load(files)).masks(2, 64, 64, torch.device("cpu"))[:, 0, 0]
    assert masks[:, [0, 20, 63]].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_what_cannot_be_is_one_line(model, files, load, tmp_path):
    networks = load(files)
    image = colours(tmp_path / "mask.png", RED)
    regions = Regions.load(image, networks)
    for spec, message in (
        (replace(SPEC, prompt="a cat"), r"1 part for 2 networks"),
        (replace(SPEC, deep_shrink=DeepShrink(0)), "Deep Shrink and regional"),
    ):
        with pytest.raises(UserError, match=message):
            list(Pipeline(model, GenerateSettings(networks=networks, regions=regions)).generate([spec]))
    with pytest.raises(UserError, match="give 1 to 7"):
        Regions.load(image, networks, color_codes=8)
    with pytest.raises(UserError, match="--mask_path .*nothing.png"):
        Regions.load(tmp_path / "nothing.png", networks)
    networks.close()
    with pytest.raises(UserError, match="--network_pre_calc"):
        Regions.load(image, load(files, network_pre_calc=True)).check_networks()
