"""LoRAs for SDXL as other programs write them: each acts on the model as the same LoRA in kohya's layout does."""

from __future__ import annotations

import logging

import pytest
import torch
from kind_files import random
from tool_files import checkpoint_tensors, layers_of, load, lora_tensors, products, save_lora, small_sdxl_model

from library.formats.families import SDXL
from library.formats.lora_file import read_lora
from library.formats.lora_layouts import lora_name
from library.models import sdxl
from library.models.clip import tokenize
from library.models.loading import load_stable_diffusion
from library.models.saving import save_stable_diffusion
from library.models.unet import unet_config
from library.testing import small_model, small_sdxl
from networks import merge_lora, resize_lora
from networks.lora import create_network_from_weights

PARTS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def model():
    return small_sdxl_model()


@pytest.fixture(scope="module")
def kohya(model):
    """A LoRA of all layers with alpha = rank, which layouts without alphas mean."""
    return lora_tensors(model, 4, 4.0, 7)


@pytest.fixture(scope="module")
def paths(model):
    return paths_of(model)


def paths_of(model):
    """LoRA name -> the part that a layer is in, its path there, and its path in a checkpoint if it is in the U-Net."""
    diffusers = {id(layer): (part, path) for part in PARTS for path, layer in model.parts[part].named_modules()}
    encoders, unet = model.for_networks()
    in_files = {id(layer): path for view in (*encoders, unet) for path, layer in view.named_modules()}
    found = {}
    for name, layer in layers_of(model).items():
        part, path = diffusers[id(layer)]
        found[name] = (part, path, in_files[id(layer)]) if part == "unet" else (part, in_files[id(layer)], None)
    return found


def outputs(model):
    """What text encoders and U-Net give for one text."""
    generator = torch.Generator().manual_seed(3)
    noisy, t = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([500])
    with torch.no_grad():
        conditioning = model.encode_text(tokenize(model.tokenizers, ["a small cat"], None))
        answer = model.predict(noisy, t, conditioning, torch.tensor([[64, 64, 0, 0, 64, 64]]))
    return torch.cat([part.flatten() for part in (*conditioning.tensors.values(), answer)])


def outputs_of(pipe):
    """The same of Diffusers' pipeline."""
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt("a small cat", do_classifier_free_guidance=False)
        noisy, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([500])
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        answer = pipe.unet(noisy, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
    return torch.cat([part.flatten() for part in (context, pooled, answer)])


def applied(model, file):
    network, weights = create_network_from_weights(1.0, file, None, *model.for_networks())
    network.apply_to(*model.for_networks())
    network.load_state_dict(weights)
    network.eval()
    result = outputs(model)
    network.unapply()
    return result


def peft(name, part, path, compvis, side):
    return f"{part}.{path}.lora_{'A' if side == 'down' else 'B'}.weight"


def diffusers(name, part, path, compvis, side):
    return f"{part}.{path}.lora{'' if part == 'unet' else '_linear_layer'}.{side}.weight"


def mixture(name, part, path, compvis, side):
    """Older OneTrainer, ai-toolkit and Diffusers' `--output_kohya_format`: kohya's prefixes, Diffusers' paths."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
    return f"{prefix}{path.replace('.', '_')}.lora_{side}.weight"


def comfy(name, part, path, compvis, side):
    """What ComfyUI's node saves."""
    if part == "unet":
        return f"diffusion_model.{compvis}.lora_{side}.weight"
    return f"text_encoders.clip_{'l' if part == 'text_encoder' else 'g'}.transformer.{path}.lora_{side}.weight"


def dotted(name, part, path, compvis, side):
    return f"{part}.{path}.lora_{side}.weight"


def onetrainer(name, part, path, compvis, side):
    """Today's OneTrainer, and everybody else."""
    return f"{name}.lora_{side}.weight"


def kohya_peft(name, part, path, compvis, side):
    """peft's tensors on kohya's layers."""
    return f"{name}.lora_{'A' if side == 'down' else 'B'}.weight"


def onetrainer_inside(name, part, path, compvis, side):
    """OneTrainer's own state before it is renamed."""
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
    return f"{prefix}.{path}.lora_{side}.weight"


def omi(name, part, path, compvis, side):
    """OneTrainer's backups, in the names of the Open Model Initiative."""
    prefix = {"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}[part]
    return f"{prefix}.{compvis or path}.lora_{side}.weight"


@pytest.mark.parametrize("layout", [peft, diffusers, mixture, comfy, dotted, onetrainer, kohya_peft, onetrainer_inside, omi])
def test_trap_46_and_47_every_layout_acts_as_kohya_s(model, kohya, paths, tmp_path, layout):
    """Where another program takes nothing or the half of it, and says so in a line for each key or not at all."""
    extra = (
        {"bundle_emb.word.clip_l": torch.zeros(2, 64), "bundle_emb.word.clip_g": torch.zeros(2, 64)}
        if layout is onetrainer
        else {}
    )
    tensors = {
        layout(name, *path, side): kohya[f"{name}.lora_{side}.weight"] for name, path in paths.items() for side in ("down", "up")
    }
    file = save_lora(tmp_path / "other.safetensors", tensors | extra)
    found = read_lora(file)
    assert found.families == (SDXL,) and set(found.modules) == set(paths) and set(found.left_out) == set(extra)
    ours = save_lora(tmp_path / "kohya.safetensors", kohya)
    plain, expected = outputs(model), applied(model, ours)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(applied(model, file), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [peft, mixture, comfy])
def test_they_are_merged_as_kohya_s(model, kohya, paths, tmp_path, layout):
    tensors = {
        layout(name, *path, side): kohya[f"{name}.lora_{side}.weight"] for name, path in paths.items() for side in ("down", "up")
    }
    base = save_lora(tmp_path / "model.safetensors", checkpoint_tensors(model))
    results = []
    for weights in (tensors, kohya):
        file, out = save_lora(tmp_path / "lora.safetensors", weights), tmp_path / "out.safetensors"
        merge_lora.main(["--sd_model", base, "--save_to", str(out), "--models", file, "--ratios", "0.5"])
        results.append(load(out))
    assert results[0].keys() == results[1].keys()
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, msg=key)


KOALA = {
    "700M": {
        "depths": {"transformer_layers_per_block": [1, 2, 5], "reverse_transformer_layers_per_block": [5, 2, 1]},
        "middle": None,
    },
    "1B": {"depths": {"transformer_layers_per_block": [1, 2, 6]}},
}


def small_koala(model, name):
    """A small model with the U-Net of KOALA and the text encoders of `model`."""
    configs = {part: dict(module.config.to_dict() if "text" in part else module.config) for part, module in model.parts.items()}
    width = configs["unet"]["cross_attention_dim"]
    configs["unet"] = unet_config(
        (32, 32, 32), context_width=width, heads=None, linear_projection=True, attention=(False, True, True), layers=1,
        vector_width=configs["text_encoder_2"]["projection_dim"] + 6 * 256, **KOALA[name],
    )  # fmt: skip
    return small_model(sdxl.FAMILY, configs)


def in_layout(layout, weights, paths):
    return {
        layout(name, *path, side): weights[f"{name}.lora_{side}.weight"]
        for name, path in paths.items()
        for side in ("down", "up")
    }


@pytest.mark.parametrize("layout", [peft, diffusers, mixture, comfy])
@pytest.mark.parametrize("name", KOALA)
def test_a_lora_for_koala_gets_the_numbers_of_its_own_blocks(model, tmp_path, name, layout):
    """Its U-Net has one ResNet where SDXL's has two, so Diffusers' names stand for other blocks of the checkpoint."""
    koala = small_koala(model, name)
    weights, places = lora_tensors(koala, 4, 4.0, 7), paths_of(koala)
    file = save_lora(tmp_path / "other.safetensors", in_layout(layout, weights, places))
    ours = save_lora(tmp_path / "kohya.safetensors", weights)
    assert set(read_lora(file).modules) == set(places)
    assert any(lora.startswith("lora_unet_input_blocks_3_1_") for lora in places)
    torch.testing.assert_close(applied(koala, file), applied(koala, ours), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [peft, diffusers, mixture])
def test_a_lora_for_few_layers_of_koala_gets_the_numbers_of_the_model_s_blocks(model, tmp_path, capsys, layout):
    """Such a file does not show whose they are, and layers of the other numbers have the same shapes."""
    koala = small_koala(model, "1B")
    weights, places = lora_tensors(koala, 4, 4.0, 7), paths_of(koala)
    few = {name: path for name, path in places.items() if path[1].startswith("up_blocks.1.attentions.0.")}
    assert few and all(name.startswith("lora_unet_output_blocks_2_1_") for name in few)
    file = save_lora(tmp_path / "other.safetensors", in_layout(layout, weights, few))
    ours = save_lora(tmp_path / "kohya.safetensors", {key: weights[key] for key in weights if key.partition(".")[0] in few})
    assert read_lora(file).families == (SDXL,) and not set(read_lora(file).modules) & set(few)
    drawn = applied(koala, ours)
    assert (drawn - outputs(koala)).abs().max() > 1e-3
    torch.testing.assert_close(applied(koala, file), drawn, rtol=1e-5, atol=1e-6)

    base = save_lora(tmp_path / "model.safetensors", checkpoint_tensors(koala))
    for one, out in ((file, "a.safetensors"), (ours, "b.safetensors")):
        merge_lora.main(["--sd_model", base, "--save_to", str(tmp_path / out), "--models", one, "--ratios", "1"])
    merged, expected = load(tmp_path / "a.safetensors"), load(tmp_path / "b.safetensors")
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, msg=key)

    resized = tmp_path / "resized.safetensors"
    resize_lora.main(["--model", file, "--save_to", str(resized), "--new_rank", "2", "--sd_model", base])
    assert set(read_lora(resized).modules) == set(few) and "KOALA" not in capsys.readouterr().err
    resize_lora.main(["--model", file, "--save_to", str(resized), "--new_rank", "2"])
    message = "other.safetensors does not show whether it is for SDXL or KOALA; taken for SDXL: for KOALA give the model with"
    assert f"warning: {tmp_path}" in (error := capsys.readouterr().err) and message in error
    assert set(read_lora(resized).modules) == set(read_lora(file).modules)


def test_one_file_that_shows_koala_s_blocks_is_enough(model, tmp_path, capsys):
    koala = small_koala(model, "1B")
    weights, places = lora_tensors(koala, 4, 4.0, 7), paths_of(koala)
    few = {name: path for name, path in places.items() if path[1].startswith("up_blocks.1.attentions.0.")}
    file = save_lora(tmp_path / "few.safetensors", in_layout(peft, weights, few))
    whole, both = save_lora(tmp_path / "whole.safetensors", weights), tmp_path / "both.safetensors"
    merge_lora.main(["--models", file, whole, "--ratios", "1", "1", "--save_to", str(both)])
    ranks = {name: adapter.low_rank().rank for name, adapter in read_lora(both).modules.items()}
    assert ranks == {name: 8 if name in few else 4 for name in places} and "KOALA" not in capsys.readouterr().err


PROJECTION = "conditioner.embedders.1.model.text_projection"
CHANGES = {
    "LoRA": {"lora_up.weight": (64, 2), "lora_down.weight": (2, 64)},
    "LoHa": {"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 64)},
    "LoRA with DoRA": {"lora_up.weight": (64, 2), "lora_down.weight": (2, 64), "dora_scale": (64, 1)},
    "IA3": {"weight": (64,), "on_input": ()},
}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_projection_is_changed_as_a_layer(model, tmp_path, kind):
    """OneTrainer trains it. Single files hold its weight transposed."""
    file = save_lora(tmp_path / "a.safetensors", random(CHANGES[kind], "lora_te2_text_projection"))
    weight = model.text_encoders[1].text_projection.weight.detach()
    (adapter,) = read_lora(file).modules.values()
    change = adapter.weight_change(weight.double())
    base, out = save_lora(tmp_path / "model.safetensors", checkpoint_tensors(model)), tmp_path / "out.safetensors"
    merge_lora.main(["--sd_model", base, "--save_to", str(out), "--models", file, "--ratios", "1"])
    before, merged = load(base), load(out)
    assert [name for name in merged if not torch.equal(merged[name], before[name])] == [PROJECTION]
    torch.testing.assert_close(merged[PROJECTION].T.double(), weight + change, atol=1e-6, rtol=1e-5)
    plain, drawn = outputs(model), applied(model, file)
    assert (drawn - plain).abs().max() > 1e-4
    torch.testing.assert_close(drawn, outputs(load_stable_diffusion(str(out))), atol=2e-5, rtol=1e-3)
    resized = str(tmp_path / "resized.safetensors")
    resize_lora.main(["--model", file, "--save_to", resized, "--new_rank", "64", "--sd_model", base])
    found = products(load(resized))["lora_te2_text_projection"]
    torch.testing.assert_close(found, change, atol=1e-6, rtol=1e-4)


def test_a_u_net_alone_in_diffusers_names_finds_its_blocks(model, kohya, paths, tmp_path):
    """Also where the names alone do not tell SDXL: the model's layers do."""
    one = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {peft(one, *paths[one], side): kohya[f"{one}.lora_{side}.weight"] for side in ("down", "up")}
    file = save_lora(tmp_path / "a.safetensors", tensors)
    assert len(read_lora(file).families) > 1
    network, weights = create_network_from_weights(1.0, file, None, *model.for_networks())
    assert [module.lora_name for module in network.loras] == [one] and f"{one}.lora_up.weight" in weights


def test_the_file_that_diffusers_itself_writes_loads(tmp_path):
    """Through peft's adapters on all three parts and the pipeline's `save_lora_weights`, with an alpha that is not the rank."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    model = small_sdxl(seed=4)
    save_stable_diffusion(model, tmp_path / "model")
    pipe = StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "model"), add_watermarker=False)
    configs, layers = {}, {}
    for name, targets in {
        "unet": ["to_q", "to_out.0", "conv1"], "text_encoder": ["q_proj"], "text_encoder_2": ["fc1", "out_proj"],
    }.items():  # fmt: skip
        part = getattr(pipe, name)
        torch.manual_seed(1)
        configs[name] = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        part.add_adapter(configs[name])
        layers[name] = convert_state_dict_to_diffusers(get_peft_model_state_dict(part))
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, layers["unet"], layers["text_encoder"], layers["text_encoder_2"],
        **{f"{name}_lora_adapter_metadata": config.to_dict() for name, config in configs.items()},
    )  # fmt: skip
    theirs = outputs_of(pipe)
    found = applied(model, tmp_path / "pytorch_lora_weights.safetensors")
    assert (theirs - outputs(model)).abs().max() > 0.05
    torch.testing.assert_close(found, theirs, atol=5e-5, rtol=1e-3)


def test_trap_63_our_file_acts_in_diffusers_as_here(tmp_path, kohya):
    from diffusers import StableDiffusionXLPipeline

    model = small_sdxl()
    save_stable_diffusion(model, tmp_path / "model")
    pipe = StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "model"), add_watermarker=False)
    file = save_lora(tmp_path / "kohya.safetensors", {key: value for key, value in kohya.items()})
    pipe.load_lora_weights(file)
    parts = (pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
    loaded = sum(name.endswith("lora_A.default_0.weight") for part in parts for name in part.state_dict())
    assert loaded == len(products(kohya))  # no key is left
    torch.testing.assert_close(outputs_of(pipe), applied(model, file), atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "path, name",
    [
        ("unet.down_blocks.1.attentions.0.proj_in", "lora_unet_input_blocks_4_1_proj_in"),
        (
            "lora_unet_up_blocks_1_attentions_2_proj_out",
            "lora_unet_output_blocks_5_1_proj_out",
        ),
        ("unet.up_blocks.0.upsamplers.0.conv", "lora_unet_output_blocks_2_2_conv"),
        ("unet.down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op"),
        ("unet.mid_block.resnets.1.conv2", "lora_unet_middle_block_2_out_layers_3"),
        ("unet.add_embedding.linear_2", "lora_unet_label_emb_0_2"),
        ("unet.time_embedding.linear_1", "lora_unet_time_embed_0"),
        ("unet.conv_in", "lora_unet_input_blocks_0_0"),
        ("unet.conv_out", "lora_unet_out_2"),
        ("diffusion_model.input_blocks.10.1.proj_in", "lora_unet_input_blocks_10_1_proj_in"),
        ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_input_blocks_4_1_proj_in"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_out", "lora_te1_text_model_encoder_layers_0_self_attn_out_proj"),
        ("text_encoder_2.encoder.layers.31.mlp.fc2", "lora_te2_text_model_encoder_layers_31_mlp_fc2"),
        ("lora_te2_text_projection", "lora_te2_text_projection"),
        ("text_encoder_2.text_projection", "lora_te2_text_projection"),
        ("text_encoders.clip_g.transformer.text_projection", "lora_te2_text_projection"),
        ("clip_g.text_projection", "lora_te2_text_projection"),
        ("transformer.blocks.0.attn.to_q", None),
    ],
)
def test_names(path, name):
    assert lora_name(path, SDXL) == name
