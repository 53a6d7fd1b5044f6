"""Files that other programs wrote: peft's and Diffusers' layouts, old and new, with or without alphas, in any type."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from library.errors import UserError
from library.formats.lora_file import read_lora
from library.formats.lora_layouts import kohya_layers, lora_name
from networks.lora import create_network, create_network_from_weights, find_layers
from networks.suite_network import SuiteNetwork

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"


def make_network(model, alpha=4.0, **network_args):
    torch.manual_seed(0)
    network = create_network(1.0, 4, alpha, None, model.text_encoder, model.unet, **network_args).eval()
    for module in network.loras:
        nn.init.normal_(module.lora_up.weight, std=0.3)
    return network


def outputs(model):
    with torch.no_grad():
        return torch.cat([part.flatten() for part in model.run()])


def applied(model, file):
    """The outputs with this file, and how many modules were found."""
    network, weights = create_network_from_weights(1.0, file, None, model.text_encoder, model.unet)
    network.load_state_dict(weights)
    network.eval().apply_to(model.text_encoder, model.unet)
    result = outputs(model)
    network.unapply()
    return result, len(network.loras)


def paths(model):
    """The path of each layer that has a LoRA, as Diffusers has it, with `unet.` or `text_encoder.text_model.` before it."""
    text, unet = ({id(m): n for n, m in part.named_modules()} for part in (model.text_encoder, model.unet))
    result = {}
    for name, layer in find_layers(model.text_encoder, model.unet, conv3x3=True).items():
        path = unet.get(id(layer)) or text[id(layer)].removeprefix("text_model.")
        result[name] = f"unet.{path}" if id(layer) in unet else f"text_encoder.text_model.{path}"
    return result


def peft(path, side):
    return f"{path}.lora_{'A' if side == 'down' else 'B'}.weight"


def diffusers(path, side):
    return f"{path}.lora.{side}.weight" if path.startswith("unet.") else f"{path}.lora_linear_layer.{side}.weight"


def attention_processors(path, side):
    """As Diffusers wrote attention layers up to 0.17: `...attn1.processor.to_out_lora.down.weight`."""
    head, _, last = path.removesuffix(".0").rpartition(".")
    if path.startswith("unet."):
        return f"{head}.processor.{last}_lora.{side}.weight"
    return f"{head}.to_{last.removesuffix('_proj')}_lora.{side}.weight"


def rewritten(model, network, key_of, only=lambda path: True, dtype=torch.float32):
    """The network's tensors by other names, without alphas."""
    state, result = network.state_dict(), {}
    for name, path in paths(model).items():
        if f"{name}.alpha" in state and only(path):
            for side in ("down", "up"):
                result[key_of(path, side)] = state[f"{name}.lora_{side}.weight"].to(dtype)
    return result


def expected_from(model, network, only=lambda path: True):
    names = [name for name, path in paths(model).items() if only(path)]
    weights = {key: t for key, t in network.state_dict().items() if key.split(".")[0] in names}
    part, _ = create_network_from_weights(1.0, None, None, model.text_encoder, model.unet, weights)
    part.load_state_dict(weights)
    part.eval().apply_to(model.text_encoder, model.unet)
    result = outputs(model)
    part.unapply()
    return result, len(part.loras)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [peft, diffusers])
def test_layouts_of_peft_and_diffusers_load(model, layout, dtype, tmp_path):
    network = make_network(model, conv_dim="4", conv_alpha="4")
    if dtype != torch.float32:
        network.to(dtype).float()
    expected, count = expected_from(model, network)
    assert count == len(network.loras)
    safetensors.torch.save_file(rewritten(model, network, layout, dtype=dtype), tmp_path / "a.safetensors")
    found, found_count = applied(model, tmp_path / "a.safetensors")
    assert found_count == count
    torch.testing.assert_close(found, expected)


def is_attention(path):
    return ".attn" in path or "self_attn" in path


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_old_attention_processor_files_load(model, prefix, tmp_path):
    """With `unet.` as in pipelines' files, and bare as `unet.save_attn_procs` wrote them, then for the U-Net alone."""
    network = make_network(model)
    only = is_attention if prefix else lambda path: is_attention(path) and path.startswith("unet.")
    weights = {
        key if prefix else key.removeprefix("unet."): t
        for key, t in rewritten(model, network, attention_processors, only).items()
    }
    assert (f"{prefix}{ATTENTION}.processor.to_out_lora.down.weight") in weights
    torch.save(weights, tmp_path / "pytorch_lora_weights.bin")
    found, count = applied(model, tmp_path / "pytorch_lora_weights.bin")
    expected, expected_count = expected_from(model, network, only)
    assert count == expected_count > 30
    torch.testing.assert_close(found, expected)


def test_the_file_that_diffusers_itself_writes_loads(model, tmp_path):
    """Through peft's adapters and `save_lora_weights`, with an alpha that differs from the rank."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    base = outputs(model)
    configs = {}
    for name, part, targets in (
        ("unet", model.unet, ["to_q", "to_out.0", "conv1"]),
        ("text_encoder", model.text_encoder, ["q_proj", "fc1"]),
    ):
        torch.manual_seed(1)
        configs[name] = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        part.add_adapter(configs[name])
    theirs = outputs(model)
    layers = {
        name: convert_state_dict_to_diffusers(get_peft_model_state_dict(part))
        for name, part in (("unet", model.unet), ("text_encoder", model.text_encoder))
    }
    for part in (model.unet, model.text_encoder):
        part.disable_adapters()
    torch.testing.assert_close(outputs(model), base)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, layers["unet"], layers["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"].to_dict(),
        text_encoder_lora_adapter_metadata=configs["text_encoder"].to_dict(),
    )  # fmt: skip
    from tiny_models import make_tiny_model

    fresh = make_tiny_model()
    found, _ = applied(fresh, tmp_path / "pytorch_lora_weights.safetensors")
    assert (theirs - base).abs().max() > 0.05
    torch.testing.assert_close(found, theirs, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_folder_that_peft_itself_writes_loads(linear_model, use_dora, tmp_path):
    """adapter_model.safetensors with adapter_config.json beside it: rank-stabilised, and DoRA with a norm for each output."""
    import peft

    base = outputs(linear_model)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=2, use_rslora=True, use_dora=use_dora, target_modules=["to_q", "conv2"], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(linear_model.unet, config)
    theirs = outputs(linear_model)
    wrapped.save_pretrained(tmp_path)
    from tiny_models import make_tiny_model

    found, _ = applied(make_tiny_model(linear_projection=True), tmp_path / "adapter_model.safetensors")
    assert (theirs - base).abs().max() > 0.01
    torch.testing.assert_close(found, theirs, atol=3e-5, rtol=1e-3)


PATTERNS = {"alpha_pattern": {"to_q": 1}, "rank_pattern": {"to_q": 2}}


@pytest.mark.parametrize(
    "kind, words",
    [
        ("LoHaConfig", {"r": 4, "alpha": 6}),
        (
            "LoHaConfig",
            {"r": 4, "alpha": 6, "use_effective_conv2d": True, **PATTERNS},
        ),
        ("LoKrConfig", {"r": 2, "alpha": 6}),
        ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True, "use_effective_conv2d": True}),
        ("LoKrConfig", {"r": 64, "alpha": 6, "rank_pattern": {"to_q": 32}}),
    ],
    ids=["LoHa", "LoHa with cores and patterns", "LoKr", "LoKr of two pairs", "LoKr of whole matrices"],
)
def test_other_kinds_that_peft_writes_have_the_strength_of_its_configuration(linear_model, kind, words, tmp_path):
    import peft

    base = outputs(linear_model)
    torch.manual_seed(1)
    config = getattr(peft, kind)(target_modules=["to_q", "conv2"], init_weights=False, **words)
    wrapped = peft.get_peft_model(linear_model.unet, config)
    theirs = outputs(linear_model)
    wrapped.save_pretrained(tmp_path)
    from tiny_models import make_tiny_model

    found, _ = applied(make_tiny_model(linear_projection=True), tmp_path / "adapter_model.safetensors")
    assert (theirs - base).abs().max() > 2e-3
    torch.testing.assert_close(found, theirs, atol=3e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("IA3Config", {"feedforward_modules": [], "init_ia3_weights": False}),
        ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "init_lora_weights": False}),
        ("VeraConfig", {"init_weights": False}),
    ],
)
def test_a_kind_that_only_peft_knows_is_named_with_its_cure(linear_model, kind, words, tmp_path):
    import peft

    wrapped = peft.get_peft_model(linear_model.unet, getattr(peft, kind)(target_modules=["to_q"], **words))
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    title = kind.removesuffix("Config").upper()
    for load in (read_lora, SuiteNetwork.read):
        with pytest.raises(
            UserError, match=f"adapter_model.safetensors is an adapter of peft's kind {title}, .* merge_and_unload"
        ):
            load(file)


@pytest.mark.parametrize("ending", ["", ".weight", ".default.weight"])
def test_the_magnitudes_of_peft_under_kohya_s_names_are_read_as_dora_s(model, ending, tmp_path):
    network = create_network(1.0, 4, 2.0, None, model.text_encoder, model.unet, dora="True")
    file = tmp_path / "a.safetensors"
    weights = {key: tensor for key, tensor in network.file_weights().items() if not key.endswith(".dora_scale")}  # up is zero
    for name, layer in find_layers(model.text_encoder, model.unet).items():
        weights[f"{name}.lora_magnitude_vector{ending}"] = layer.weight.detach().flatten(1).norm(dim=1) * 1.5
    safetensors.torch.save_file(weights, file)
    loaded, weights = create_network_from_weights(1.0, file, None, model.text_encoder, model.unet)
    loaded.load_state_dict(weights)
    assert {type(module).__name__ for module in loaded.loras} == {"DoRAModule"}
    assert loaded.load_weights(file).missing_keys == []
    before = [layer.weight.clone() for layer in find_layers(model.text_encoder, model.unet).values()]
    loaded.merge_to(model.text_encoder, model.unet, weights)
    for old, layer in zip(before, find_layers(model.text_encoder, model.unet).values(), strict=True):
        torch.testing.assert_close(layer.weight, 1.5 * old)


def test_alphas_in_other_layouts_count(model):
    network = make_network(model)
    weights = rewritten(model, network, peft)
    weights[f"unet.{ATTENTION}.to_q.alpha"] = torch.tensor(1.0)
    named = kohya_layers(weights).weights()
    name = f"lora_unet_{ATTENTION}_to_q".replace(".", "_")
    assert named[f"{name}.alpha"] == 1
    loaded, _ = create_network_from_weights(1.0, None, None, model.text_encoder, model.unet, weights)
    loaded.load_state_dict(weights)  # by their own names
    assert {m.scale for m in loaded.loras} == {1.0, 0.25}
    before = model.weights()
    loaded.merge_to(model.text_encoder, model.unet, weights)
    assert sum(not torch.equal(a, b) for a, b in zip(before, model.weights(), strict=True)) == len(network.loras)


@pytest.mark.parametrize(
    "path, name",
    [
        (f"unet.{ATTENTION}.to_out.0", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"),
        (f"base_model.model.{ATTENTION}.to_q", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("text_encoder.encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("text_encoder.text_model.encoder.layers.1.self_attn.to_out", "lora_te_text_model_encoder_layers_1_self_attn_out_proj"),
        ("transformer.blocks.0.attn.to_q", None),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", None),
    ],
)
def test_names(path, name):
    assert lora_name(path) == name


def test_kohya_s_own_names_stay_and_a_wrong_config_is_named(model, tmp_path):
    state = make_network(model).state_dict()
    assert list(kohya_layers(state).weights()) == list(state)
    file = tmp_path / "adapter_model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, file)
    (tmp_path / "adapter_config.json").write_text("[1", encoding="utf-8")
    with pytest.raises(UserError, match="adapter_model.safetensors: the description of its alphas is not readable"):
        SuiteNetwork.read(file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}), encoding="utf-8")
    assert list(SuiteNetwork.read(file)) == ["a"]
