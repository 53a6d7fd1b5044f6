"""Every kind of adapter through every tool: the table of docs/networks.md, one test a cell."""

from __future__ import annotations

import pytest
import torch
from kind_files import CONV, GLORA_3X3, KINDS, LAYER, NORM, TUCKER, file_of, layer_of, random, title_of
from tool_files import checkpoint_tensors, load, lora_tensors, save_lora, small_model

from library.errors import UserError
from library.formats.lora_file import read_lora
from networks import check_lora_weights, merge_lora, resize_lora, svd_merge_lora

KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
CONV_KEY = "model.diffusion_model.middle_block.0.in_layers.2.weight"
NORM_KEY = "model.diffusion_model.middle_block.1.norm"
NEED_THE_MODEL = ("GLoRA", GLORA_3X3, "IA3", "OFT", "BOFT", "LoRA with DoRA", "LoRA with DoRA, by input")
EXACT_AT_32 = ("LoRA", TUCKER, "LoHa", "GLoRA", GLORA_3X3)  # the ranks of these changes are 2, 2, 4, 4 and 20
EXACT_SUM = ("LoRA", TUCKER)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("kinds") / "model.safetensors"
    tensors = checkpoint_tensors(small_model())
    save_lora(path, tensors)
    return path, tensors


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    path = save_lora(tmp_path / "kind.safetensors", file_of(request.param))
    assert read_lora(path).modules[layer_of(request.param)].title == title_of(request.param)
    return request.param, path


def key_of(kind):
    return CONV_KEY if layer_of(kind) == CONV else KEY


def change_of(path, weight):
    (adapter,) = read_lora(path).modules.values()
    return adapter.weight_change(weight)


def test_merge_into_a_model_adds_the_change_and_nothing_else(kind, model, tmp_path):
    (name, path), (base, tensors) = kind, model
    key, out = key_of(name), tmp_path / "out.safetensors"
    merge_lora.main(["--sd_model", str(base), "--save_to", str(out), "--models", path, "--ratios", "0.5"])
    merged = load(out)
    torch.testing.assert_close(merged[key], tensors[key] + 0.5 * change_of(path, tensors[key]), atol=1e-6, rtol=1e-5)
    assert [other for other in tensors if not torch.equal(merged[other], tensors[other])] == [key]


@pytest.mark.parametrize("tool", [resize_lora, svd_merge_lora])
def test_a_lora_of_rank_32_is_the_nearest_one(kind, model, tmp_path, tool):
    name, path = kind
    base, tensors = model
    out = tmp_path / "out.safetensors"
    source = ["--model", path] if tool is resize_lora else ["--models", path, "--ratios", "1"]
    words = [*source, "--save_to", str(out), "--new_rank", "32"]
    if name in NEED_THE_MODEL:
        with pytest.raises(
            UserError, match=f"kind.safetensors: {layer_of(name)} is of the kind {title_of(name)}, .* with --sd_model"
        ):
            tool.main(words)
        words += ["--sd_model", str(base)]
    tool.main(words)
    found = read_lora(out).modules[layer_of(name)].low_rank()
    assert found is not None
    expected = change_of(path, tensors[key_of(name)]).double().flatten(1)
    up, down = found.matrices()
    error = (up.double() @ down.double() * found.scale - expected).norm()
    u, s, vh = torch.linalg.svd(expected)
    assert error <= max(1.001 * s[32:].norm(), 1e-6 * s.norm())
    assert (error < 1e-5 * s.norm()) == (name in EXACT_AT_32 or s[32:].norm() < 1e-5 * s.norm())


def test_check_names_the_kind(kind, capsys):
    check_lora_weights.main([kind[1]])
    lines = capsys.readouterr().out.splitlines()
    title, layer = title_of(kind[0]), layer_of(kind[0])
    row = next(line for line in lines if line.startswith(layer))
    assert title == "LoRA" or (row.endswith(title) and f"kinds: 1 {title}" in lines)


def test_a_mixture_of_kinds_is_merged_by_svd(model, tmp_path):
    parts = {name: save_lora(tmp_path / f"{name}.safetensors", random(KINDS[name])) for name in ("LoRA", "LoHa")}
    out = tmp_path / "out.safetensors"
    svd_merge_lora.main(["--models", *parts.values(), "--ratios", "1", "-0.5", "--new_rank", "6", "--save_to", str(out)])
    found = read_lora(out).modules[LAYER].low_rank()
    weight = model[1][KEY]
    expected = change_of(parts["LoRA"], weight) - 0.5 * change_of(parts["LoHa"], weight)
    torch.testing.assert_close(found.up @ found.down * found.scale, expected, atol=1e-6, rtol=1e-4)


def test_the_sum_in_one_lora_is_exact_or_an_error_with_its_cure(kind, model, tmp_path):
    (name, path), out = kind, tmp_path / "out.safetensors"
    words = ["--models", path, path, "--ratios", "1", "-0.25", "--save_to", str(out)]
    if name not in EXACT_SUM:
        says = f"is of the kind {title_of(name)}, whose sum with others is no LoRA; use svd_merge_lora.py"
        with pytest.raises(UserError, match=says):
            merge_lora.main(words)
        return
    merge_lora.main(words)
    weight = model[1][key_of(name)]
    torch.testing.assert_close(change_of(out, weight), 0.75 * change_of(path, weight), atol=1e-6, rtol=1e-4)


def test_a_flat_pair_for_a_kernel_becomes_a_lora_of_a_convolution(model, tmp_path):
    out_size, *inside = model[1][CONV_KEY].shape
    size = torch.Size(inside).numel()
    shapes = {"hada_w1_a": (out_size, 2), "hada_w1_b": (2, size), "hada_w2_a": (out_size, 2), "hada_w2_b": (2, size)}
    path = save_lora(tmp_path / "loha.safetensors", random(shapes, CONV))
    resize_lora.main(["--model", path, "--save_to", str(tmp_path / "out.safetensors"), "--new_rank", "4"])
    assert read_lora(tmp_path / "out.safetensors").modules[CONV].low_rank().down.shape == (4, *inside)


def test_norms_and_biases_are_merged_and_no_part_of_a_lora(model, tmp_path, capsys):
    torch.manual_seed(0)
    base, tensors = model
    size = len(tensors[f"{NORM_KEY}.weight"])
    changes = random({"w_norm": (size,), "b_norm": (size,)}, NORM) | random({**KINDS["full difference"], "diff_b": (64,)}, CONV)
    changes[f"{CONV}.diff"] = torch.randn(tensors[CONV_KEY].shape) * 0.1
    path = save_lora(tmp_path / "full.safetensors", changes)
    out = tmp_path / "out.safetensors"
    merge_lora.main(["--sd_model", str(base), "--save_to", str(out), "--models", path, "--ratios", "2"])
    merged = load(out)
    bias = CONV_KEY.replace("weight", "bias")
    expected = {f"{NORM_KEY}.weight": "w_norm", f"{NORM_KEY}.bias": "b_norm", CONV_KEY: "diff", bias: "diff_b"}
    for key, name in expected.items():
        change = changes[f"{NORM if 'norm' in name else CONV}.{name}"]
        torch.testing.assert_close(merged[key], tensors[key] + 2 * change)
    assert {name for name in tensors if not torch.equal(merged[name], tensors[name])} == set(expected)
    resize_lora.main(["--model", path, "--save_to", str(out), "--new_rank", "2"])
    assert list(read_lora(out).modules) == [CONV]
    assert "a LoRA cannot change 1 norm layers or biases alone, 1 biases beside weights" in capsys.readouterr().err


def test_layers_outside_of_the_blocks_are_merged(model, tmp_path):
    torch.manual_seed(0)
    base, tensors = model
    prefix, lora = "model.diffusion_model.", {}
    layers = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding_linear_1": "time_embed.0"}
    for name, key in layers.items():
        weight = tensors[f"{prefix}{key}.weight"]
        lora[f"lora_unet_{name}.lora_up.weight"] = torch.randn(len(weight), 2, *[1] * (weight.dim() - 2)) * 0.1
        lora[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, *weight.shape[1:]) * 0.1
    path, out = save_lora(tmp_path / "a.safetensors", lora), tmp_path / "out.safetensors"
    merge_lora.main(["--sd_model", str(base), "--save_to", str(out), "--models", path, "--ratios", "1"])
    merged = load(out)
    for name, key in layers.items():
        up, down = (lora[f"lora_unet_{name}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        weight = tensors[f"{prefix}{key}.weight"]
        torch.testing.assert_close(merged[f"{prefix}{key}.weight"], weight + (up @ down).view(weight.shape), atol=1e-6, rtol=1e-5)


def test_a_kind_changes_its_third_of_open_clip(tmp_path):
    model = small_model("sd2")
    tensors = checkpoint_tensors(model)
    base = save_lora(tmp_path / "v2.safetensors", tensors)
    layer, key = (
        "lora_te_text_model_encoder_layers_0_self_attn_k_proj",
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
    )
    width = tensors[key].shape[1]
    path = save_lora(tmp_path / "ia3.safetensors", random({"weight": (width,), "on_input": ()}, layer))
    out = tmp_path / "out.safetensors"
    merge_lora.main(["--sd_model", base, "--save_to", str(out), "--models", path, "--ratios", "1", "--v2"])
    before, after = tensors[key].chunk(3), load(out)[key].chunk(3)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    torch.testing.assert_close(after[1], before[1] * (1 + load(path)[f"{layer}.weight"]))


def test_a_plain_lora_is_resized_as_before(tmp_path):
    path = save_lora(tmp_path / "a.safetensors", lora_tensors(small_model(), 4, only="mid_block_attentions"))
    resize_lora.main(["--model", path, "--save_to", str(tmp_path / "out.safetensors"), "--new_rank", "2"])
    assert {module.low_rank().rank for module in read_lora(tmp_path / "out.safetensors").modules.values()} == {2}
