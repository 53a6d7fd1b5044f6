"""convert_diffusers20_original_sd: both ways, nothing lost, and nothing in --metadata is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.errors import UserError
from library.models.saving import save_stable_diffusion
from library.testing import small_stable_diffusion
from tools.convert_diffusers20_original_sd import main

ROOT = Path(__file__).parents[2]
SIZES = dict(unet_channels=(32, 64, 64, 64), vae_channels=(32, 32, 32, 32))


@pytest.fixture(scope="module", params=[False, True], ids=["v1", "v2"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    model = small_stable_diffusion(v2=request.param, v_parameterization=request.param, **SIZES)
    save_stable_diffusion(model, folder / "model.safetensors", torch.float16)
    return folder, request.param


def convert(source, target, *words):
    main([str(source), str(target), *words])
    return target


def test_there_and_back_is_the_same_bit_for_bit(model, tmp_path):
    folder, v2 = model
    there = convert(folder / "model.safetensors", tmp_path / "folder", *(["--v_parameterization"] if v2 else []))
    scheduler = json.loads((there / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert scheduler["prediction_type"] == ("v_prediction" if v2 else "epsilon")
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
    folder, v2 = model
    source = folder / "model.safetensors"
    cases = [
        ((tmp_path / "m.zip",), "suffix decides"),
        ((source,), "overwrite the model"),
        ((tmp_path / "m.safetensors", "--epoch", "1"), "a .ckpt only"),
        ((tmp_path / "m.ckpt", "--metadata", "{}"), "a .safetensors file only"),
        ((tmp_path / "m.ckpt", "--fp16", "--bf16"), "not allowed with"),
        ((tmp_path / "m.ckpt", "--reference_model", "x"), "come with this suite"),
        ((tmp_path / "m.ckpt", "--v1" if v2 else "--v2"), "SD 2.x model" if v2 else "SD 1.x model"),
        ((tmp_path / "m.ckpt", "--floot"), "did you mean '--float'"),
    ]
    for words, message in cases:
        with pytest.raises(UserError, match=message):
            convert(source, *words)
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
