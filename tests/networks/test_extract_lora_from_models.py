"""extract_lora_from_models: gives back what was added, leaves out what did not change, and refuses what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tool_files import checkpoint_tensors, load, lora_tensors, metadata_of, products, save_lora, small_model

from library.errors import UserError
from library.formats.lora_targets import lora_targets
from library.formats.low_rank import delta
from library.formats.tensor_file import open_tensors
from library.tools.extract import Extraction, extract
from networks.extract_lora_from_models import main

CONV_KINDS = ("conv1", "conv2", "_conv")


def added(tensors, weights):
    """The checkpoint with a LoRA's products added in float64."""
    places = lora_targets({name: tuple(value.shape) for name, value in tensors.items()})
    result = {name: value.clone() for name, value in tensors.items()}
    for name, product in products(weights).items():
        rows = places[name].rows(len(result[places[name].key]))
        part = result[places[name].key][rows]
        result[places[name].key][rows] = (part.double() + product.view(part.shape)).float()
    return result


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def models(request, tmp_path_factory):
    """A model, the same with a known LoRA of rank 4 in it, and that LoRA."""
    folder = tmp_path_factory.mktemp("extract")
    model = small_model(request.param)
    tensors, weights = checkpoint_tensors(model), lora_tensors(model, 4, 4.0)
    save_lora(folder / "org.safetensors", tensors)
    save_lora(folder / "tuned.safetensors", added(tensors, weights))
    return folder, weights, {"sd1": [], "sd2": ["--v2"]}[request.param]


def run(models, *words, name="lora.safetensors", tuned="tuned.safetensors"):
    folder, _, v2 = models
    main(
        [
            "--model_org",
            str(folder / "org.safetensors"),
            "--model_tuned",
            str(folder / tuned),
            "--save_to",
            str(folder / name),
            *v2,
            *words,
        ]
    )
    return load(folder / name)


def test_a_known_lora_is_given_back(models):
    result, expected = products(run(models, "--dim", "4", "--conv_dim", "4")), products(models[1])
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert float((result[name] - value).norm() / value.norm()) < 1e-3, name


def test_without_conv_dim_only_attention_layers(models):
    result = run(models)
    assert all("_attentions_" in key or key.startswith("lora_te_") for key in result)
    assert {len(value) for key, value in result.items() if key.endswith("lora_down.weight")} == {4}


def test_metadata(models):
    run(models, "--dim", "2", "--conv_dim", "3", "--v_parameterization", "--save_precision", "fp16")
    metadata = metadata_of(models[0] / "lora.safetensors")
    v2 = bool(models[2])
    assert metadata["ss_network_dim"] == "2" and metadata["ss_network_alpha"] == "2.0" and metadata["ss_v2"] == str(v2)
    assert metadata["ss_network_args"] == '{"conv_dim": "3", "conv_alpha": "3.0"}'
    assert metadata["ss_base_model_version"] == ("sd_v2_v" if v2 else "sd_v1_v")
    assert metadata["ss_training_comment"] == "extracted: tuned.safetensors - org.safetensors"


def test_explained_picks_the_smallest_rank_for_each_module(models, capsys):
    result = run(models, "--explained", "0.8")
    for name, value in products(models[1]).items():
        if f"{name}.lora_down.weight" in result:
            s = np.linalg.svd(value.numpy(), compute_uv=False)
            expected = int(np.argmax(np.sqrt(np.cumsum(s**2)) >= 0.8 * np.linalg.norm(s) * (1 - 1e-6))) + 1
            assert len(result[f"{name}.lora_down.weight"]) == expected, name
    assert metadata_of(models[0] / "lora.safetensors")["ss_network_dim"] == "Dynamic"
    assert float(capsys.readouterr().out.split("all ")[1].split("%")[0]) >= 80


def test_trap_1_10_a_small_change_of_the_text_encoder_is_not_thrown_away(tmp_path):
    model = small_model()
    tensors = checkpoint_tensors(model)
    weights = {key: value * 0.1 for key, value in lora_tensors(model, 1, 1.0, only="layers_1_mlp_fc1").items()}
    weights = {key: value / 0.1 if key.endswith("alpha") else value for key, value in weights.items()}
    tuned = added(tensors, weights)
    key = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    assert float((tuned[key] - tensors[key]).abs().max()) < 0.01  # the peer's threshold
    save_lora(tmp_path / "org.safetensors", tensors)
    save_lora(tmp_path / "tuned.safetensors", tuned)
    result = run((tmp_path, None, []))
    assert {key.split(".")[0] for key in result} == {"lora_te_text_model_encoder_layers_1_mlp_fc1"}


def test_identical_text_encoders_give_a_unet_lora_and_rounding_is_no_change(tmp_path, capsys):
    model = small_model()
    tensors = checkpoint_tensors(model)
    tuned = added(tensors, lora_tensors(model, 2, only="lora_unet_mid_block"))
    save_lora(tmp_path / "org.safetensors", tensors)
    save_lora(tmp_path / "tuned.safetensors", {k: v.half() if v.is_floating_point() else v for k, v in tuned.items()})
    result = run((tmp_path, None, []))
    assert result and all(key.startswith("lora_unet_mid_block") for key in result)
    assert "the LoRA is for the U-Net alone" in capsys.readouterr().out


def test_trap_1_11_it_can_be_called_as_a_library(models):
    folder = models[0]
    with open_tensors(folder / "org.safetensors") as original, open_tensors(folder / "tuned.safetensors") as tuned:
        modules, kept, unchanged = extract(original, tuned, Extraction(dim=1))
    assert modules and not unchanged and modules.keys() == kept.keys()
    assert all(0 < after < before for before, after in kept.values())
    name = next(iter(modules))
    expected = products(models[1])[name]
    s = torch.linalg.svdvals(expected)
    assert float((delta(modules[name]).flatten(1) - expected).norm()) == pytest.approx(float(s[1:].norm()), rel=1e-3)


def test_trap_1_7_no_clamping_unless_asked_for(models):
    plain, clamped = run(models), run(models, "--clamp_quantile", "0.9")
    expected = products(models[1])
    for name, value in products(plain).items():
        assert float((value - expected[name]).norm() / value.norm()) < 1e-3, name
    key = next(key for key in plain if key.endswith("lora_down.weight"))
    assert clamped[key].abs().max() < plain[key].abs().max()


def test_wrong_input(models):
    folder, _, v2 = models
    cases = {
        ("--dim", "0"): "at least 1",
        ("--explained", "1.5"): "at most 1",
        ("--min_diff", "-1"): "must not be negative",
        ("--dims", "4"): "did you mean '--dim'",
    }
    for words, message in cases.items():
        with pytest.raises(UserError, match=message):
            run(models, *words)
    with pytest.raises(UserError, match="do not differ"):
        run(models, tuned="org.safetensors")
    with pytest.raises(UserError, match="leave out --sdxl"):
        run((folder, None, ["--sdxl"]))
    if not v2:
        with pytest.raises(UserError, match="leave out --v2"):
            run((folder, None, ["--v2"]))
    with pytest.raises(UserError, match="is a folder"):
        run(models, tuned=".")
    with pytest.raises(UserError, match="overwrite an input"):
        run(models, name="org.safetensors")


def test_models_of_other_sizes_and_nan_are_named(models):
    folder = models[0]
    tensors = load(folder / "org.safetensors")
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    save_lora(folder / "small.safetensors", tensors | {key: tensors[key][:3]})
    with pytest.raises(UserError, match="attn1_to_q is .* not of one kind"):
        run(models, tuned="small.safetensors")
    save_lora(folder / "nan.safetensors", tensors | {key: tensors[key] * float("nan")})
    with pytest.raises(UserError, match="attn1_to_q: it holds NaN"):
        run(models, tuned="nan.safetensors")
