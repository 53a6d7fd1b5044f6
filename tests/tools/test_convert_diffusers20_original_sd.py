"""convert_diffusers20_original_sd: both ways, nothing lost, and nothing in --metadata is run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.saving import save_stable_diffusion
from library.testing import small_sdxl, small_stable_diffusion
from tools.convert_diffusers20_original_sd import main

ROOT = Path(__file__).parents[2]
SIZES = dict(unet_channels=(32, 64, 64, 64), vae_channels=(32, 32, 32, 32))


@pytest.fixture(scope="module", params=[("sd1", False), ("sd2", True)], ids=["sd1", "sd2"])
def model(request, tmp_path_factory):
    """A folder with the model in a file, and whether it is an SD 2 that predicts v."""
    folder = tmp_path_factory.mktemp("convert")
    family, predicts_v = request.param
    model = small_stable_diffusion(family=family, v_parameterization=predicts_v, **SIZES)
    save_stable_diffusion(model, folder / "model.safetensors", torch.float16)
    return folder, predicts_v


def convert(source, target, *words):
    main([str(source), str(target), *words])
    return target


def test_there_and_back_is_the_same_bit_for_bit(model, tmp_path):
    folder, predicts_v = model
    there = convert(folder / "model.safetensors", tmp_path / "folder", *(["--v_parameterization"] if predicts_v else []))
    scheduler = json.loads((there / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert scheduler["prediction_type"] == ("v_prediction" if predicts_v else "epsilon")
    back = load_file(convert(there, tmp_path / "back.safetensors"))
    original = load_file(folder / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == torch.float16 for name, value in original.items())


@pytest.mark.parametrize("words, dtype", [(["--float"], torch.float32), (["--save_precision_as", "bf16"], torch.bfloat16)])
def test_dtype_and_counters_in_a_ckpt(model, tmp_path, words, dtype):
    path = convert(model[0] / "model.safetensors", tmp_path / "m.ckpt", "--epoch", "3", "--global_step", "40", *words)
    content = torch.load(path, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 40)
    assert {value.dtype for name, value in content["state_dict"].items() if name.endswith("conv_in.weight")} <= {dtype}


def test_trap_1_16_metadata_is_json_and_not_run(model, tmp_path):
    source = model[0] / "model.safetensors"
    path = convert(source, tmp_path / "m.safetensors", "--metadata", '{"modelspec.title": "mine"}')
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.title"] == "mine"
    evil = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"
    for text in (evil, "[1]", '{"a": 1}'):
        with pytest.raises(UserError, match="--metadata"):
            convert(source, tmp_path / "n.safetensors", "--metadata", text)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "n.safetensors").exists()


def test_wrong_input(model, tmp_path):
    folder, predicts_v = model
    source = folder / "model.safetensors"
    cases = [
        ((tmp_path / "m.zip",), "suffix decides"),
        ((source,), "overwrite the model"),
        ((tmp_path / "m.safetensors", "--epoch", "1"), "a .ckpt only"),
        ((tmp_path / "m.ckpt", "--metadata", "{}"), "a .safetensors file only"),
        ((tmp_path / "m.ckpt", "--fp16", "--bf16"), "not allowed with"),
        ((tmp_path / "m.ckpt", "--reference_model", "x"), "come with this suite"),
        ((tmp_path / "m.ckpt", "--v1" if predicts_v else "--v2"), "SD 2.x model" if predicts_v else "SD 1.x model"),
        ((tmp_path / "m.ckpt", "--floot"), "did you mean '--float'"),
    ]
    for words, message in cases:
        with pytest.raises(UserError, match=message):
            convert(source, *words)
    if not predicts_v:
        with pytest.raises(UserError, match="--unet_use_linear_projection: SD 1.x has no linear projections"):
            convert(source, tmp_path / "m", "--unet_use_linear_projection")
    with pytest.raises(UserError, match="neither a file nor a folder here"):
        convert("nobody/nothing", tmp_path / "m.ckpt")
    (tmp_path / "bad.safetensors").write_bytes(source.read_bytes()[:500])
    with pytest.raises(UserError, match="bad.safetensors"):
        convert(tmp_path / "bad.safetensors", tmp_path / "m.ckpt")


def test_help_is_quick_and_imports_nothing_heavy(tmp_path):
    code = "import sys, tools.convert_diffusers20_original_sd; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "False False\n"
    script = str(ROOT / "tools" / "convert_diffusers20_original_sd.py")
    result = subprocess.run([sys.executable, script, "a", "b.c"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.startswith("error: b.c: the suffix decides")


@pytest.fixture
def folder(tmp_path):
    """A Diffusers folder of the small model in fp16."""
    save_stable_diffusion(small_stable_diffusion(**SIZES), tmp_path / "folder", torch.float16)
    return tmp_path / "folder"


def shards(part, suffix=""):
    """The weights of a part's folder in two files with an index."""
    whole = part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names, where = list(tensors), {}
    for number, some in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"diffusion_pytorch_model{suffix}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, part / file)
        where |= dict.fromkeys(some, file)
    index = part / f"diffusion_pytorch_model.safetensors.index{suffix}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    return index


@pytest.mark.parametrize("suffix", ["", ".fp16"])
def test_a_folder_in_shards_is_the_same_model(folder, tmp_path, suffix):
    whole = load_file(convert(folder, tmp_path / "whole.safetensors"))
    index = shards(folder / "unet", suffix)
    found = load_file(convert(folder, tmp_path / "sharded.safetensors"))
    assert found.keys() == whole.keys() and all(torch.equal(found[name], value) for name, value in whole.items())
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"]["conv_in.more"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="lacks the tensor conv_in.more"):
        convert(folder, tmp_path / "b.safetensors")
    index.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is no index of weights"):
        convert(folder, tmp_path / "b.safetensors")


def test_weights_under_another_name_are_named(folder, tmp_path):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(UserError, match="rename diffusion_pytorch_model.non_ema.safetensors to that if it is meant"):
        convert(folder, tmp_path / "a.safetensors")


def test_full_weights_beside_fp16_ones_keep_their_dtype(folder, tmp_path):
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        half = load_file(folder / part / f"{name}.safetensors")
        save_file(half, folder / part / f"{name}.fp16.safetensors")
        save_file({key: value.float() * 1.0001 for key, value in half.items()}, folder / part / f"{name}.safetensors")
    found = load_file(convert(folder, tmp_path / "a.safetensors"))
    assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.parametrize(
    "config, what", [({"time_cond_proj_dim": 256}, "an LCM"), ({"class_embed_type": "projection"}, "an unCLIP model")]
)
def test_models_with_other_inputs_are_named(folder, tmp_path, config, what):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
    with pytest.raises(UserError, match=f"is {what} .*use the .* model it was made from"):
        convert(folder, tmp_path / "a.safetensors")


def test_a_file_of_8_bits_becomes_fp16_and_one_without_vae_gets_another(model, tmp_path):
    tensors = load_file(model[0] / "model.safetensors")
    eight = {name: value.to(torch.float8_e4m3fn) if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(eight, tmp_path / "fp8.safetensors")
    found = load_file(convert(tmp_path / "fp8.safetensors", tmp_path / "a.safetensors"))
    name = next(name for name in tensors if name.endswith("input_blocks.0.0.weight"))
    assert torch.equal(found[name], eight[name].half())
    save_file({key: value for key, value in tensors.items() if "first_stage" not in key}, tmp_path / "no_vae.safetensors")
    with pytest.raises(UserError, match="no_vae.safetensors holds no vae; give a VAE with --vae"):
        convert(tmp_path / "no_vae.safetensors", tmp_path / "b.safetensors")
    given = load_file(
        convert(tmp_path / "no_vae.safetensors", tmp_path / "b.safetensors", "--vae", str(model[0] / "model.safetensors"))
    )
    assert given.keys() == tensors.keys()


def test_every_part_keeps_its_own_dtype(tmp_path, capsys):
    """Also within a part: many files have float32 norms, or a float32 VAE beside a float16 U-Net."""
    save_stable_diffusion(small_stable_diffusion(**SIZES), tmp_path / "model.safetensors")
    starts = {
        "first_stage_model.": torch.float32,
        "cond_stage_model.": torch.bfloat16,
        "model.diffusion_model.out.0": torch.float32,
    }
    tensors = {
        name: value.to(next((dtype for start, dtype in starts.items() if name.startswith(start)), torch.float16))
        for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "mixed.safetensors")
    folder = convert(tmp_path / "mixed.safetensors", tmp_path / "folder")
    assert "float16, vae float32, text_encoder bfloat16" in capsys.readouterr().out
    back = load_file(convert(folder, tmp_path / "back.safetensors"))
    assert {name: value.dtype for name, value in back.items()} == {name: value.dtype for name, value in tensors.items()}
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_traps_1_2_and_51_sdxl_there_and_back_with_marks_and_a_projection_turned_both_ways(tmp_path):
    source = tmp_path / "model.safetensors"
    save_stable_diffusion(replace(small_sdxl(v_parameterization=True), zero_terminal_snr=True), source, torch.float16)
    original = load_file(source)
    assert original["v_pred"].numel() == original["ztsnr"].numel() == 0
    folder = convert(source, tmp_path / "folder")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]
    back = load_file(convert(folder, tmp_path / "back.safetensors"))
    assert back.keys() == original.keys() and all(torch.equal(back[name], value) for name, value in original.items())
    key = "conditioner.embedders.1.model.text_projection"
    in_folder = load_file(folder / "text_encoder_2" / "model.safetensors")["text_projection.weight"]
    assert torch.equal(in_folder, original[key].T) and not torch.equal(in_folder, original[key])


@pytest.mark.parametrize("extra", ["text_projection.weight", "logit_scale", "visual_projection.weight"])
def test_what_a_text_encoders_folder_has_of_clip_beside_it_is_no_use_here(model, tmp_path, extra):
    folder, predicts_v = model
    there = convert(folder / "model.safetensors", tmp_path / "folder")
    weights = load_file(there / "text_encoder" / "model.safetensors")
    save_file(weights | {extra: torch.ones(64, 64)}, there / "text_encoder" / "model.safetensors")
    back, original = load_file(convert(there, tmp_path / "back.safetensors")), load_file(folder / "model.safetensors")
    assert all(torch.equal(back[name], value) for name, value in original.items())


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_to_itself_is_one_line(model, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="cannot write .*loop"):
        main([str(model[0] / "model.safetensors"), str(tmp_path / "loop")])
