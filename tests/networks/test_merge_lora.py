"""merge_lora: into a model it is what the network module does; LoRA with LoRA is the exact sum."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tool_files import (
    EXTRAS,
    NETWORK_TOOLS,
    assert_close,
    checkpoint_tensors,
    layers_of,
    load,
    lora_tensors,
    metadata_of,
    products,
    save_lora,
    small_model,
    total,
)

from library.errors import UserError
from library.formats import tensor_output
from library.models.loading import load_stable_diffusion
from networks.lora import create_network_from_weights
from networks.merge_lora import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def files(request, tmp_path_factory):
    """A checkpoint in fp16, and two LoRAs of other ranks, the second without alphas and for the U-Net alone."""
    folder = tmp_path_factory.mktemp("merge")
    model = small_model(request.param)
    save_lora(folder / "model.safetensors", checkpoint_tensors(model), format="pt", note="kept")
    save_lora(folder / "a.safetensors", lora_tensors(model, 4, 2.0, 1))
    save_lora(folder / "b.safetensors", lora_tensors(model, 3, None, 2, conv3x3=False, only="lora_unet"))
    return folder, model, {"sd1": [], "sd2": ["--v2"]}[request.param]


def merged(files, *words, save_to="out.safetensors"):
    folder, _, v2 = files
    loras = [str(folder / "a.safetensors"), str(folder / "b.safetensors")]
    main(["--sd_model", str(folder / "model.safetensors"), "--save_to", str(folder / save_to), "--models", *loras, *v2, *words])
    return folder / save_to


def test_parts_of_tensors_make_the_same_file(files, monkeypatch):
    """Also where a part begins within the query, key and value of SD 2's text encoder, which are one tensor."""
    whole = load(merged(files, "--ratios", "0.8", "-0.5", save_to="whole.safetensors"))
    monkeypatch.setattr(tensor_output, "PART", 1000)
    parts = load(merged(files, "--ratios", "0.8", "-0.5", save_to="parts.safetensors"))
    assert parts.keys() == whole.keys() and all(
        torch.allclose(parts[k].float(), whole[k].float(), atol=1e-6, rtol=2e-3) for k in whole
    )


def test_merged_model_is_what_the_network_module_makes_of_it(files):
    folder, _, v2 = files
    path = merged(files, "--ratios", "0.8", "-0.5")
    ours = load_stable_diffusion(str(path), v2=bool(v2))
    expected = load_stable_diffusion(str(folder / "model.safetensors"), v2=bool(v2))
    for name, ratio in (("a", 0.8), ("b", -0.5)):
        network, weights = create_network_from_weights(
            ratio, str(folder / f"{name}.safetensors"), expected.vae, expected.text_encoders[0], expected.denoiser
        )
        network.merge_to(expected.text_encoders[0], expected.denoiser, weights)
    found, wanted = layers_of(ours), layers_of(expected)
    assert len(found) > 100
    for name in wanted:
        torch.testing.assert_close(found[name].weight, wanted[name].weight, rtol=1e-5, atol=1e-6, msg=name)


def test_what_no_lora_touches_stays_bit_for_bit(files):
    folder = files[0]
    before, after = load(folder / "model.safetensors"), load(merged(files, "--ratios", "1", "1"))
    assert before.keys() == after.keys() and EXTRAS.keys() <= after.keys()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert EXTRAS.keys() <= set(same) and any("first_stage_model" in name for name in same)
    assert all(before[name].dtype == after[name].dtype for name in before)
    metadata = metadata_of(folder / "out.safetensors")
    assert metadata["note"] == "kept"
    assert [(part["name"], part["ratio"]) for part in json.loads(metadata["ss_merged_from"])] == [
        ("a.safetensors", 1),
        ("b.safetensors", 1),
    ]
    assert metadata["modelspec.merged_from"] == "model, a, b"


def test_save_precision_and_ckpt(files):
    path = merged(files, "--ratios", "1", "1", "--save_precision", "fp16", "--no_metadata", save_to="out.ckpt")
    after = load(path)
    assert after["betas"].dtype == torch.float32  # the noise schedule keeps its own
    assert {value.dtype for name, value in after.items() if name.endswith(".weight")} == {torch.float16}
    again = load(merged(files, "--ratios", "1", "1", "--save_precision", "fp16"))
    assert all(torch.equal(again[name], value) for name, value in after.items())


def test_a_half_precision_ckpt_keeps_its_dtype_and_old_text_encoder_names(tmp_path):
    model = small_model()
    tensors = checkpoint_tensors(model, torch.float16)
    tensors = {name.replace("transformer.text_model.", "transformer."): value for name, value in tensors.items()}
    torch.save({"state_dict": tensors, "epoch": 4, "global_step": 9}, tmp_path / "model.ckpt")
    weights = lora_tensors(model, only="lora_te")
    lora = save_lora(tmp_path / "a.safetensors", weights)
    main(["--sd_model", str(tmp_path / "model.ckpt"), "--save_to", str(tmp_path / "out.ckpt"), "--models", lora, "--ratios", "1"])
    content = torch.load(tmp_path / "out.ckpt", weights_only=True)
    key = "cond_stage_model.transformer.encoder.layers.1.mlp.fc1.weight"
    expected = tensors[key].double() + products(weights)["lora_te_text_model_encoder_layers_1_mlp_fc1"]
    torch.testing.assert_close(content["state_dict"][key].double(), expected, rtol=1e-3, atol=1e-3)
    assert content["state_dict"][key].dtype == torch.float16 and content["epoch"] == 4 and content["global_step"] == 9


@pytest.mark.parametrize("eight", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_model_of_8_bits_becomes_fp16_since_its_rounding_is_coarser_than_most_loras(tmp_path, eight):
    tensors = {k: v.to(eight) if "." in k and v.is_floating_point() else v for k, v in checkpoint_tensors(small_model()).items()}
    base = save_lora(tmp_path / "model.safetensors", tensors)
    lora = lora_tensors(small_model(), 2, only="mid_block_attentions_0_proj_in")
    out = tmp_path / "out.safetensors"
    main(["--sd_model", base, "--save_to", str(out), "--models", save_lora(tmp_path / "a.safetensors", lora), "--ratios", "0.01"])
    merged, key = load(out), "model.diffusion_model.middle_block.1.proj_in.weight"
    assert {value.dtype for name, value in merged.items() if name.endswith((".weight", ".bias"))} == {torch.float16}
    (change,) = products(lora, 0.01).values()
    expected = tensors[key].double() + change.view(tensors[key].shape)
    torch.testing.assert_close(merged[key].double(), expected, atol=1e-5, rtol=1e-3)


def test_sd2_projections_may_be_linear_or_1x1_convolutions(tmp_path):
    model = small_model("sd2")
    weights = lora_tensors(model, only="mid_block_attentions_0_proj_in")
    as_conv = {key: value[:, :, None, None] if value.dim() == 2 else value for key, value in weights.items()}
    checkpoint = save_lora(tmp_path / "m.safetensors", checkpoint_tensors(model))
    results = []
    for tensors in (weights, as_conv):
        lora = save_lora(tmp_path / "a.safetensors", tensors)
        main(["--sd_model", checkpoint, "--save_to", str(tmp_path / "o.safetensors"), "--models", lora, "--ratios", "1", "--v2"])
        results.append(load(tmp_path / "o.safetensors"))
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    assert torch.equal(results[0][key], results[1][key]) and not torch.equal(results[0][key], load(checkpoint)[key])


# ---------------------------------------------------------------- LoRA with LoRA


@pytest.fixture(scope="module")
def model():
    return small_model()


def combine(tmp_path, parts, ratios, *words, name="out.safetensors"):
    paths = [
        save_lora(tmp_path / f"{i}.safetensors", tensors, ss_network_alpha="1", ss_seed="5") for i, tensors in enumerate(parts)
    ]
    main(["--save_to", str(tmp_path / name), "--models", *paths, "--ratios", *map(str, ratios), *words])
    return load(tmp_path / name)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_trap_1_1_strength_is_linear_in_the_ratio(model, tmp_path, ratio):
    weights = lora_tensors(model, only="mid_block")
    assert_close(products(combine(tmp_path, [weights], [ratio])), products(weights, ratio))


def test_trap_1_2_no_cross_terms(model, tmp_path):
    a, b = lora_tensors(model, 4, 2.0, 1), lora_tensors(model, 7, 7.0, 2, conv3x3=False)
    result = combine(tmp_path, [a, b], [0.6, 0.4])
    assert_close(products(result), total(products(a, 0.6), products(b, 0.4)))


def test_trap_1_3_negative_ratios(model, tmp_path):
    a, b = lora_tensors(model, only="down_blocks_0", seed=1), lora_tensors(model, only="down_blocks_0", seed=2)
    assert_close(products(combine(tmp_path, [a, b], [-0.5, 1])), total(products(a, -0.5), products(b)))


def test_trap_1_4_concat_is_the_sum_for_any_rank_and_alpha(model, tmp_path):
    a, b = lora_tensors(model, 2, 8.0, 1, only="up_blocks_1"), lora_tensors(model, 5, None, 2, only="up_blocks_1")
    result = combine(tmp_path, [a, b], [0.3, 0.9], "--concat", "--shuffle")
    assert_close(products(result), total(products(a, 0.3), products(b, 0.9)))
    assert {len(value) for name, value in result.items() if "lora_down" in name} == {7}


def test_trap_1_5_rank_and_hashes_are_those_of_the_file(model, tmp_path):
    a, b = lora_tensors(model, 2, 2.0, 1), lora_tensors(model, 3, 1.0, 2)
    combine(tmp_path, [a, b], [1, 1], "--save_precision", "fp16")
    metadata = metadata_of(tmp_path / "out.safetensors")
    assert metadata["ss_network_dim"] == "5" and metadata["ss_network_alpha"] == "5.0"
    content = (tmp_path / "out.safetensors").read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert all(value.dtype == torch.float16 for value in load(tmp_path / "out.safetensors").values())


def test_trap_1_6_metadata_is_written_and_says_what_was_merged(model, tmp_path):
    a = lora_tensors(model, 2, only="mid_block")
    combine(tmp_path, [a, a], [0.25, -1])
    metadata = metadata_of(tmp_path / "out.safetensors")
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_seed"] == "5"
    assert [part["ratio"] for part in json.loads(metadata["ss_merged_from"])] == [0.25, -1]
    assert metadata["ss_training_comment"] == "merged: 0.25 x 0.safetensors + -1 x 1.safetensors"
    assert metadata["modelspec.title"] == "out" and metadata["modelspec.merged_from"] == "0, 1"
    combine(tmp_path, [a, a], [0.25, -1], "--no_metadata")
    assert {key.split("_")[0] for key in metadata_of(tmp_path / "out.safetensors")} == {"ss", "sshs"}


def test_trap_1_15_sd2_is_marked_as_predicting_v_only_if_it_does(tmp_path):
    weights = lora_tensors(small_model("sd2"), only="mid_block")

    def spec(*words, **said):
        lora = save_lora(tmp_path / "a.safetensors", weights, ss_v2="True", **said)
        main(["--save_to", str(tmp_path / "o.safetensors"), "--models", lora, "--ratios", "1", *words])
        metadata = metadata_of(tmp_path / "o.safetensors")
        return metadata.get("ss_base_model_version"), metadata.get("modelspec.prediction_type")

    assert spec() == (None, None)
    assert spec(ss_base_model_version="sd_v2") == ("sd_v2", "epsilon")
    assert spec(ss_base_model_version="sd_v2_v") == ("sd_v2_v", "v")
    assert spec("--v_parameterization") == ("sd_v2_v", "v")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
def test_pickled_loras_in_and_out(model, tmp_path, suffix):
    a = lora_tensors(model, only="mid_block")
    torch.save(a, tmp_path / f"a{suffix}")
    main(["--save_to", str(tmp_path / f"o{suffix}"), "--models", str(tmp_path / f"a{suffix}"), "--ratios", "2"])
    assert_close(products(torch.load(tmp_path / f"o{suffix}", weights_only=True)), products(a, 2))


# ---------------------------------------------------------------- wrong input


def error(*words):
    """What the command says to these words."""
    with pytest.raises(UserError) as caught:
        main(list(words))
    return str(caught.value)


def test_wrong_input_is_named_before_any_work(model, tmp_path):
    a, b = (save_lora(tmp_path / f"{name}.safetensors", lora_tensors(model, only="mid_block")) for name in "ab")
    out = str(tmp_path / "o.safetensors")
    assert "2 given for 1 models" in error("--save_to", out, "--models", a, "--ratios", "1", "2")
    assert "at least one LoRA" in error("--save_to", out)
    assert "nan is no strength" in error("--save_to", out, "--models", a, "--ratios", "nan")
    assert "overwrite an input" in error("--save_to", a, "--models", a, "--ratios", "1")
    assert "did you mean '--ratios'" in error("--save_to", out, "--models", a, "--ratio", "1")
    sd1 = save_lora(tmp_path / "sd1.safetensors", lora_tensors(model, only="mid_block"), ss_v2="False")
    assert "sd1.safetensors is for SD 1.x; leave out --v2" in error("--save_to", out, "--models", sd1, "--ratios", "1", "--v2")
    assert "invalid choice" in error("--save_to", out, "--models", a, "--ratios", "1", "--precision", "fp8")
    checkpoint = save_lora(tmp_path / "m.safetensors", checkpoint_tensors(model))
    assert "a whole model" in error("--save_to", out, "--models", checkpoint, "--ratios", "1")
    assert "leave out --v2" in error("--sd_model", checkpoint, "--save_to", out, "--models", a, "--ratios", "1", "--v2")
    assert "a.safetensors is a LoRA, not a model; give it" in error(
        "--sd_model", a, "--save_to", out, "--models", a, "--ratios", "1"
    )
    part = save_lora(tmp_path / "part.safetensors", {"cond_stage_model.transformer.text_model.a.weight": torch.ones(2)})
    assert "no checkpoint of SD 1.x or SD 2.x or SDXL: it lacks the U-Net" in error(
        "--sd_model", part, "--save_to", out, "--models", a, "--ratios", "1"
    )
    assert "Diffusers folder" in error("--sd_model", str(tmp_path), "--save_to", out, "--models", a, "--ratios", "1")
    assert not Path(out).exists() and not list(tmp_path.glob(".*"))


def test_generations_are_distinguished(model, tmp_path):
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"

    def lora(file, width):
        tensors = {f"{name}.lora_down.weight": torch.ones(1, width), f"{name}.lora_up.weight": torch.ones(width, 1)}
        return save_lora(tmp_path / file, tensors)

    out = str(tmp_path / "o.safetensors")
    v1, v2 = lora("v1.safetensors", 768), lora("v2.safetensors", 1024)
    assert "v1.safetensors is for SD 1.x" in error("--save_to", out, "--models", v1, v2, "--ratios", "1", "1")
    checkpoint = save_lora(tmp_path / "m.safetensors", checkpoint_tensors(model))
    text = error("--sd_model", checkpoint, "--save_to", out, "--models", v2, "--ratios", "1")
    assert "v2.safetensors is for SD 2.x" in text
    text = error("--sd_model", checkpoint, "--save_to", out, "--models", v1, "--ratios", "1")
    assert "does not fit" in text and name in text  # the small model's text encoder is 64 wide


def test_modules_the_model_lacks_are_named(model, tmp_path, capsys):
    tensors = lora_tensors(model, only="mid_block")
    tensors |= {f"lora_te_text_model_encoder_layers_99_mlp_fc1.lora_{side}.weight": torch.ones(2, 2) for side in ("up", "down")}
    a = save_lora(tmp_path / "a.safetensors", tensors)
    checkpoint = save_lora(tmp_path / "m.safetensors", checkpoint_tensors(model))
    main(["--sd_model", checkpoint, "--save_to", str(tmp_path / "o.safetensors"), "--models", a, "--ratios", "1"])
    assert "no layer for 1 of the LoRA modules, such as lora_te_text_model_encoder_layers_99_mlp_fc1" in capsys.readouterr().err


def test_as_a_script_from_anywhere(model, tmp_path):
    """Run as people do, in another folder; what it printed arrives though the process ends at once. A mistake is one line."""
    a = save_lora(tmp_path / "a.safetensors", lora_tensors(model, only="mid_block"))
    script = str(ROOT / "networks" / "merge_lora.py")
    good = [sys.executable, script, "--save_to", "o.safetensors", "--models", a, "--ratios", "0.5"]
    result = subprocess.run(good, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "saved o.safetensors: the exact sum, rank 4" in result.stdout
    with pytest.raises(UserError, match="^unknown option '--ration'; did you mean '--ratios'\\?$"):
        main([*good[2:], "--ration", "1"])


def test_nothing_heavy_is_imported():
    imports = "; ".join(f"import networks.{tool}" for tool in NETWORK_TOOLS)
    code = f"import sys; {imports}; print([m for m in sys.modules if '.' not in m])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert not {"diffusers", "transformers", "accelerate", "pydantic"} & set(eval(result.stdout))
