"""The tools on SDXL: the family is read from the files, names and results are those of training and drawing.

Numbers of faults ("trap 51") are those of the list of what other programs get wrong with SDXL.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tool_files import (
    EXTRAS,
    assert_close,
    checkpoint_tensors,
    layers_of,
    load,
    lora_tensors,
    metadata_of,
    products,
    save_lora,
    small_model,
    small_sdxl_model,
    total,
)

from library.errors import UserError
from library.formats.blocks import SDXL_BLOCKS, block_of
from library.formats.families import SDXL
from library.formats.lora_file import read_lora
from library.formats.lora_targets import lora_targets
from library.models.clip import tokenize
from library.models.loading import load_stable_diffusion
from library.tools.block_weights import read_block_weights
from networks import (
    check_lora_weights,
    dylora,
    extract_lora_from_dylora,
    extract_lora_from_models,
    merge_lora,
    resize_lora,
    sdxl_merge_lora,
    svd_merge_lora,
)
from networks.lora import create_network_from_weights, find_layers

ROOT = Path(__file__).parents[2]
MARKS = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, two LoRAs of other ranks (the second without alphas and for the U-Net's attention alone), SD 1's as well."""
    folder = tmp_path_factory.mktemp("sdxl")
    model = small_sdxl_model()
    save_lora(folder / "model.safetensors", checkpoint_tensors(model))
    save_lora(folder / "a.safetensors", lora_tensors(model, 4, 2.0, 1))
    save_lora(folder / "b.safetensors", lora_tensors(model, 3, None, 2, conv3x3=False, only="lora_unet"))
    save_lora(folder / "sd1.safetensors", checkpoint_tensors(small_model()))
    save_lora(folder / "sd1_lora.safetensors", lora_tensors(small_model(), 2))
    return folder


def words(folder, *more, models=("a", "b"), ratios=("0.8", "-0.5"), save_to="out.safetensors"):
    paths = [str(folder / f"{name}.safetensors") for name in models]
    return ["--save_to", str(folder / save_to), "--models", *paths, "--ratios", *ratios, *more]


def predicted(model):
    """What the U-Net answers to a text, with the small model's sizes."""
    generator = torch.Generator().manual_seed(3)
    noisy, t = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([500])
    with torch.no_grad():
        conditioning = model.encode_text(tokenize(model.tokenizers, ["a small cat"], None))
        return model.predict(noisy, t, conditioning, torch.tensor([[64, 64, 0, 0, 64, 64]]))


# ---------------------------------------------------------------- into a model


def test_a_merged_model_is_the_model_with_the_loras_applied(folder):
    merge_lora.main(words(folder, "--sd_model", str(folder / "model.safetensors")))
    merged, applied = (load_stable_diffusion(str(folder / f"{name}.safetensors")) for name in ("out", "model"))
    plain, networks = predicted(applied), []
    for name, ratio in (("a", 0.8), ("b", -0.5)):
        network, weights = create_network_from_weights(ratio, str(folder / f"{name}.safetensors"), None, *applied.for_networks())
        network.apply_to(*applied.for_networks())
        network.load_state_dict(weights)
        networks.append(network.eval())
    expected = predicted(applied)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(predicted(merged), expected, atol=2e-5, rtol=1e-4)
    for network in networks:
        network.unapply()
    before, after = load(folder / "model.safetensors"), load(folder / "out.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {target.key for target in lora_targets({key: tuple(t.shape) for key, t in before.items()}).values()}
    assert EXTRAS.keys() <= after.keys() and before.keys() == after.keys()


@pytest.mark.parametrize("save_precision", [[], ["--save_precision", "fp16"]])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_trap_51_marks_of_the_prediction_survive_and_the_metadata_follow(folder, tmp_path, suffix, save_precision):
    tensors = checkpoint_tensors(small_sdxl_model()) | MARKS
    base = save_lora(tmp_path / "noob.safetensors", tensors)
    out = tmp_path / f"out.{suffix}"
    merge_lora.main(["--sd_model", base, *words(folder, *save_precision), "--save_to", str(out)])
    assert {key: value.numel() for key, value in load(out).items() if key in MARKS} == {"v_pred": 0, "ztsnr": 0}
    again = load_stable_diffusion(str(out))
    assert (again.prediction, again.zero_terminal_snr) == ("v", True)
    if suffix == "safetensors":
        metadata = metadata_of(out)
        assert metadata["modelspec.prediction_type"] == "v"
        assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
        assert metadata["modelspec.resolution"] == "1024x1024"


def test_trap_53_a_lora_of_another_base_is_named_when_it_is_merged(folder, tmp_path, capsys):
    old = save_lora(tmp_path / "old.safetensors", load(folder / "a.safetensors"), ss_base_model_version="sdxl_base_v0-9")
    words = ["--sd_model", str(folder / "model.safetensors"), "--ratios", "1", "--save_to", str(tmp_path / "out.safetensors")]
    merge_lora.main([*words, "--models", old])
    assert f"warning: {old} was trained on a model of SDXL 0.9" in capsys.readouterr().err
    merge_lora.main([*words, "--models", str(folder / "a.safetensors")])
    assert "was trained on" not in capsys.readouterr().err


def test_strengths_by_block_also_when_merging_into_a_model(folder):
    zero = ["0"] * 20
    zero[SDXL_BLOCKS.lists[20].index("OUT01")] = "1"
    model = ["--sd_model", str(folder / "model.safetensors")]
    merge_lora.main(words(folder, *model, "--lbws", f"[{','.join(zero)}]", models=["a"], ratios=["1"]))
    before, after = load(folder / "model.safetensors"), load(folder / "out.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(".output_blocks.1." in key for key in changed)


# ---------------------------------------------------------------- LoRAs together


@pytest.mark.parametrize("tool", [merge_lora, sdxl_merge_lora])
def test_trap_52_the_sum_of_loras_is_linear_in_the_ratios(folder, tool):
    tool.main(words(folder, "--sdxl"))
    a, b, found = (load(folder / f"{name}.safetensors") for name in ("a", "b", "out"))
    assert_close(products(found), total(products(a, 0.8), products(b, -0.5)))
    assert {name for name in products(found)} == set(layers_of(small_sdxl_model()))
    metadata = metadata_of(folder / "out.safetensors")
    assert (metadata["ss_v2"], metadata["ss_base_model_version"]) == ("False", "sdxl_base_v1-0")
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert "modelspec.prediction_type" not in metadata  # nothing says it


@pytest.mark.parametrize("said", ["v", "epsilon"])
@pytest.mark.parametrize("tool", [merge_lora, svd_merge_lora])
def test_trap_51_merged_loras_keep_what_their_parts_predict(folder, tmp_path, tool, said):
    facts = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.prediction_type": said}
    a = save_lora(tmp_path / "a.safetensors", lora_tensors(small_sdxl_model(), 2, only="middle_block"), **facts)
    out = tmp_path / "out.safetensors"
    tool.main(["--models", a, a, "--ratios", "1", "1", "--save_to", str(out)])
    assert metadata_of(out)["modelspec.prediction_type"] == said


@pytest.mark.parametrize("tool", [resize_lora, svd_merge_lora])
def test_one_file_whose_names_fit_several_families_goes_with_the_model(folder, tmp_path, tool):
    """Also a kind whose change depends on the model's weight."""
    name, key = "lora_unet_middle_block_0_in_layers_2", "model.diffusion_model.middle_block.0.in_layers.2.weight"
    out_size, in_size = load(folder / "model.safetensors")[key].shape[:2]
    tensors = {f"{name}.weight": torch.full((out_size,), 0.5), f"{name}.on_input": torch.tensor(0)}
    file, out = save_lora(tmp_path / "a.safetensors", tensors), str(tmp_path / "out.safetensors")
    source = ["--model", file] if tool is resize_lora else ["--models", file, "--ratios", "1"]
    tool.main([*source, "--sd_model", str(folder / "model.safetensors"), "--new_rank", str(9 * in_size), "--save_to", out])
    expected = 0.5 * load(folder / "model.safetensors")[key].double().flatten(1)
    assert_close(products(load(out)), {name: expected})


def test_one_file_whose_names_fit_several_families_goes_with_the_other(folder, tmp_path):
    """`middle_block` is in the checkpoints of all families."""
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    weights = lora_tensors(small_sdxl_model(), 2, only=name)
    both = save_lora(tmp_path / "both.safetensors", weights)
    assert len(read_lora(both).families) > 1
    out = tmp_path / "out.safetensors"
    merge_lora.main(["--models", both, str(folder / "a.safetensors"), "--ratios", "1", "1", "--save_to", str(out)])
    expected = total(products(weights), products(load(folder / "a.safetensors")))
    assert_close({name: products(load(out))[name]}, {name: expected[name]})
    merge_lora.main([
        "--sd_model", str(folder / "model.safetensors"), "--models", both, "--ratios", "1", "--save_to", str(out),
    ])  # fmt: skip
    before, after = load(folder / "model.safetensors"), load(out)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == ["model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"]


@pytest.mark.parametrize("count", [12, 20])
def test_svd_merge_takes_the_lists_of_sdxl(folder, capsys, count):
    numbers = [round(0.1 * place, 1) for place in range(count)]
    text = ",".join(map(str, numbers))
    svd_merge_lora.main(words(folder, "--new_rank", "8", "--lbw", text, "ALL"))
    weights = dict(zip(SDXL_BLOCKS.lists[count], numbers, strict=True))
    a, b, found = (products(load(folder / f"{name}.safetensors")) for name in ("a", "b", "out"))
    parts = {name: 0.8 * weights.get(block_of(name), 1.0) * value for name, value in a.items()}
    expected = total(parts, {name: -0.5 * value for name, value in b.items()})
    nothing = [name for name, value in expected.items() if not value.any()]
    assert nothing and all(not found.pop(name).any() for name in nothing)
    assert_close(found, {name: value for name, value in expected.items() if name not in nothing}, 2e-4)
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert printed == ["text", *SDXL_BLOCKS.names[2:10], "MID", *SDXL_BLOCKS.names[13:22], "all"]


def test_lists_and_presets_for_other_blocks_are_errors_that_name_the_blocks(folder):
    for text, says in {
        ",".join(
            ["1"] * 17
        ): "17 numbers given; for SDXL give 12 or 20 numbers with commas \\(12: BASE IN04 IN05 IN07 IN08 MID OUT00",
        "MIDD": "MIDD is made for the blocks of Stable Diffusion 1.x and 2.x; for SDXL give 12 or 20",
        "MIDDLE": "or one of NONE, ALL, INALL, OUTALL, ALL0.5",
    }.items():
        with pytest.raises(UserError, match=says):
            svd_merge_lora.main(words(folder, "--lbw", text, text))
    assert read_block_weights("OUTALL", SDXL_BLOCKS)["OUT08"] == 1 and read_block_weights("outall", SDXL_BLOCKS)["IN08"] == 0


# ---------------------------------------------------------------- out of models


@pytest.fixture(scope="module")
def tuned(folder):
    """The checkpoint with a known LoRA of rank 4 in it, and that LoRA."""
    tensors, weights = checkpoint_tensors(small_sdxl_model()), lora_tensors(small_sdxl_model(), 4, 4.0, 5)
    save_lora(folder / "tuned.safetensors", with_loras(tensors, weights))
    return weights


def with_loras(tensors, weights):
    targets = lora_targets({name: tuple(value.shape) for name, value in tensors.items()})
    result = {name: value.clone() for name, value in tensors.items()}
    for name, product in products(weights).items():
        whole = result[targets[name].key]
        rows = targets[name].rows(len(whole))
        whole[rows] = (whole[rows].double() + product.view(whole[rows].shape)).float()
    return result


def extract(folder, *more, tuned="tuned", original="model"):
    models = ["--model_org", str(folder / f"{original}.safetensors"), "--model_tuned", str(folder / f"{tuned}.safetensors")]
    extract_lora_from_models.main([*models, "--save_to", str(folder / "extracted.safetensors"), *more])
    return load(folder / "extracted.safetensors")


def test_a_known_lora_is_given_back(folder, tuned):
    found, expected = products(extract(folder, "--sdxl", "--dim", "4", "--conv_dim", "4")), products(tuned)
    assert_close(found, expected, 1e-3)
    assert set(found) == set(layers_of(small_sdxl_model()))
    metadata = metadata_of(folder / "extracted.safetensors")
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == ("sdxl_base_v1-0", "False")
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.prediction_type"] == "epsilon"


def test_without_conv_dim_only_attention_layers_and_text_encoders(folder, tuned):
    assert {key.partition(".")[0] for key in extract(folder)} == set(attention_layers())


def attention_layers():
    return find_layers(*small_sdxl_model().for_networks())


def test_trap_49_a_small_change_of_one_encoder_is_extracted_and_the_other_left_out(folder, tmp_path):
    """Each module is judged by itself, relative to its weights; the common trainer judges both encoders by one threshold."""
    tensors = checkpoint_tensors(small_sdxl_model())
    weights = lora_tensors(small_sdxl_model(), 1, 0.02, only="lora_te2")
    save_lora(folder / "te2.safetensors", with_loras(tensors, weights))
    assert max(float(value.abs().max()) for value in products(weights).values()) < 0.003
    found = {key.partition(".")[0] for key in extract(folder, "--dim", "1", tuned="te2")}
    assert found == set(products(weights))


def test_trap_50_no_square_matrix_is_made_of_a_tall_difference(folder, tuned, monkeypatch):
    """The common trainer makes U of 10240 x 10240 for a layer of 10240 x 1280; here nothing is larger than the layer."""
    largest = []
    for name in ("svd", "qr", "eigh"):
        plain = getattr(torch.linalg, name)

        def watched(matrix, *args, plain=plain, **kwargs):
            result = plain(matrix, *args, **kwargs)
            largest.append(max(part.numel() for part in result))
            return result

        monkeypatch.setattr(torch.linalg, name, watched)
    extract(folder, "--dim", "4")
    shapes = [tensor.shape for key, tensor in load(folder / "model.safetensors").items() if "ff.net.0.proj.weight" in key]
    assert largest and max(largest) <= max(shape.numel() for shape in shapes) < max(shape[0] for shape in shapes) ** 2


def test_trap_51_the_prediction_of_an_extracted_lora_is_that_of_its_models(folder, tuned):
    save_lora(folder / "v.safetensors", load(folder / "tuned.safetensors") | MARKS)
    extract(folder, tuned="v")
    assert metadata_of(folder / "extracted.safetensors")["modelspec.prediction_type"] == "v"


def test_trap_48_the_base_model_is_named_by_every_tool_also_without_metadata(folder, tuned):
    """A1111 takes a file that has metadata but not this one for SD 1.x, and hides it beside an SDXL model."""
    extract(folder, "--no_metadata")
    merge_lora.main(words(folder, "--no_metadata", save_to="merged.safetensors"))
    svd_merge_lora.main(words(folder, "--no_metadata", save_to="svd.safetensors"))
    resize_lora.main(
        ["--model", str(folder / "a.safetensors"), "--new_rank", "2", "--save_to", str(folder / "resized.safetensors")]
    )
    for name in ("extracted", "merged", "svd", "resized"):
        assert metadata_of(folder / f"{name}.safetensors")["ss_base_model_version"] == "sdxl_base_v1-0", name
    assert not any(key.startswith("modelspec.") for key in metadata_of(folder / "merged.safetensors"))


# ---------------------------------------------------------------- one LoRA


def test_resize_gives_the_nearest_of_the_rank_by_the_same_names(folder):
    resize_lora.main(["--model", str(folder / "a.safetensors"), "--new_rank", "2", "--save_to", str(folder / "r.safetensors")])
    found, full = products(load(folder / "r.safetensors")), products(load(folder / "a.safetensors"))
    assert found.keys() == full.keys()
    for name, value in full.items():
        lost = torch.linalg.svdvals(value)[2:].norm()
        assert float((found[name] - value).norm()) == pytest.approx(float(lost), rel=1e-3), name


def test_trap_44_a_dylora_has_both_encoders_under_their_names_and_is_split(folder, tmp_path):
    torch.manual_seed(0)
    network = dylora.create_network(1.0, 4, 4.0, None, *small_sdxl_model().for_networks(), unit="2")
    for module in network.loras:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    network.save_weights(tmp_path / "dylora.safetensors", None, {})
    extract_lora_from_dylora.main(
        ["--model", str(tmp_path / "dylora.safetensors"), "--unit", "2", "--save_to", str(tmp_path / "s.safetensors")]
    )
    whole = read_lora(tmp_path / "dylora.safetensors")
    assert set(whole.modules) == set(attention_layers()) and whole.family is SDXL
    for rank in (2, 4):
        part = read_lora(tmp_path / f"s-{rank:04}.safetensors")
        assert part.modules.keys() == whole.modules.keys() and part.family is SDXL
        assert {module.low_rank().rank for module in part.modules.values()} == {rank}


def test_check_names_family_and_blocks(folder, capsys):
    check_lora_weights.main([str(folder / "a.safetensors")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("for: SDXL; ") for line in lines)
    start = next(place for place, line in enumerate(lines) if line.startswith("block "))
    blocks = [line.split()[0] for line in lines[start + 1 : lines.index("", start)]]
    assert blocks == ["text", *SDXL_BLOCKS.names[2:10], "MID", *SDXL_BLOCKS.names[13:22]]


# ---------------------------------------------------------------- families


def test_trap_7_files_of_different_families_are_named(folder):
    model, sd1 = str(folder / "model.safetensors"), str(folder / "sd1.safetensors")
    into = ["--save_to", str(folder / "never.safetensors"), "--ratios", "1"]
    a, other = str(folder / "a.safetensors"), str(folder / "sd1_lora.safetensors")
    cases = [
        (merge_lora, ["--sd_model", sd1, *into, "--models", a], "a.safetensors is for SDXL, .*sd1.safetensors is SD 1.x"),
        (merge_lora, ["--sd_model", model, *into, "--models", other], "sd1_lora.safetensors is for SD 1.x or SD 2.x, .* is SDXL"),
        (merge_lora, ["--sd_model", model, *into, "--models", a, "--v2"], "model.safetensors is an SDXL model; leave out --v2"),
        (merge_lora, ["--sd_model", sd1, *into, "--models", other, "--sdxl"], "is an SD 1.x model; leave out --sdxl"),
        (merge_lora, [*into, "1", "--models", a, other], "a.safetensors is for SDXL and .*sd1_lora.safetensors for SD 1.x or"),
        (merge_lora, [*into, "--models", other, "--sdxl"], "sd1_lora.safetensors is for SD 1.x or SD 2.x; leave out --sdxl"),
        (svd_merge_lora, [*into, "--models", a, "--v2"], "a.safetensors is for SDXL; leave out --v2"),
    ]  # fmt: skip
    for tool, command, says in cases:
        with pytest.raises(UserError, match=says):
            tool.main(command)
    with pytest.raises(UserError, match="is SDXL, .*sd1.safetensors is SD 1.x; give two models of one family"):
        extract(folder, tuned="sd1")
    with pytest.raises(UserError, match="--load_tuned_model_to is not supported: .* leave the option out"):
        extract(folder, "--load_tuned_model_to", "cuda")
    assert not (folder / "never.safetensors").exists()


def test_a_lora_for_another_family_does_not_act_on_a_model(folder):
    for model, file, says in (
        (small_model(), "a", "they are a LoRA for SDXL"),
        (small_sdxl_model(), "sd1_lora", "they are a LoRA for SD 1.x or SD 2.x"),
    ):
        with pytest.raises(ValueError, match=f"none of these weights .* has a layer in this model; {says}"):
            create_network_from_weights(1.0, folder / f"{file}.safetensors", None, *model.for_networks())


def test_the_program_has_two_names(folder):
    script = str(ROOT / "networks" / "sdxl_merge_lora.py")
    done = subprocess.run([sys.executable, script, *words(folder)], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "the exact sum, rank" in done.stdout, done.stderr
    other = importlib.import_module("networks.merge_lora")
    assert sdxl_merge_lora.main is other.main and sdxl_merge_lora.options is other.options
    assert json.loads(metadata_of(folder / "out.safetensors")["ss_merged_from"])[1]["ratio"] == -0.5
