from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.loading import load_stable_diffusion
from library.models.saving import save_stable_diffusion
from library.testing import small_stable_diffusion


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


@pytest.fixture
def source(tmp_path, saved_models):
    """For each generation a CompVis file with everything that real ones hold beside the models."""

    def make(v2: bool):
        tensors = load_file(saved_models[v2, "model.safetensors"])
        tensors["betas"] = torch.linspace(0, 1, 1000)
        tensors["model_ema.decay"] = torch.tensor(0.9)
        if v2:
            tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
            tensors["cond_stage_model.model.transformer.resblocks.2.mlp.c_fc.bias"] += 1
        else:
            tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        return tensors

    return make


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_every_tensor_of_the_source_file_comes_back(tmp_path, source, v2, suffix):
    tensors = source(v2)
    save_file(tensors, tmp_path / "source.safetensors")
    model = load_stable_diffusion(str(tmp_path / "source.safetensors"), v2=v2)
    save_stable_diffusion(model, tmp_path / f"again{suffix}")
    if suffix == ".ckpt":
        again = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    else:
        again = load_file(tmp_path / "again.safetensors")
    assert_same_tensors(again, tensors)


def test_old_clip_names_and_counters_come_back(tmp_path, source):
    new, old = "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."
    tensors = {name.replace(new, old): value for name, value in source(False).items()}
    torch.save({"state_dict": tensors, "global_step": 470000, "epoch": 2}, tmp_path / "model.ckpt")
    model = load_stable_diffusion(str(tmp_path / "model.ckpt"))
    save_stable_diffusion(model, tmp_path / "model.ckpt")  # over its own source
    again = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert (again["global_step"], again["epoch"]) == (470000, 2)
    assert_same_tensors(again["state_dict"], tensors)


def test_through_a_diffusers_folder_and_back(tmp_path, small_models, saved_models):
    for v2 in (False, True):
        model = load_stable_diffusion(str(saved_models[v2, "folder"]), v2=v2)
        save_stable_diffusion(model, tmp_path / "back.safetensors")
        assert_same_tensors(load_file(tmp_path / "back.safetensors"), load_file(saved_models[v2, "model.safetensors"]))


def test_dtype_spares_the_noise_schedule(tmp_path, source):
    save_file(source(True), tmp_path / "source.safetensors")
    model = load_stable_diffusion(str(tmp_path / "source.safetensors"), v2=True)
    save_stable_diffusion(model, tmp_path / "half.safetensors", dtype=torch.float16)
    half = load_file(tmp_path / "half.safetensors")
    assert {name for name, value in half.items() if value.dtype != torch.float16} == {"betas"}


def test_metadata(tmp_path, small_models):
    save_stable_diffusion(small_models[False], tmp_path / "m.safetensors", metadata={"modelspec.title": "x"})
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.title": "x"}
    for name in ("m.ckpt", "folder"):
        with pytest.raises(UserError, match="no place for metadata"):
            save_stable_diffusion(small_models[False], tmp_path / name, metadata={"modelspec.title": "x"})
        assert not (tmp_path / name).exists()


def test_values_that_are_not_finite_are_never_saved(tmp_path):
    model = small_stable_diffusion()
    with torch.no_grad():
        model.denoiser.conv_out.bias[1] = float("nan")
    for name in ("m.safetensors", "m.ckpt", "folder"):
        with pytest.raises(UserError, match="conv_out.bias of the unet holds values that are not finite"):
            save_stable_diffusion(model, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_folders_are_replaced_only_if_they_are_models(tmp_path, small_models, saved_models):
    folder = tmp_path / "model"
    folder.mkdir()
    save_stable_diffusion(small_models[False], folder)
    (folder / "unet" / "old.txt").write_text("x", encoding="utf-8")
    save_stable_diffusion(small_models[False], folder)
    assert not (folder / "unet" / "old.txt").exists()
    other = tmp_path / "images"
    other.mkdir()
    (other / "cat.png").write_bytes(b"x")
    with pytest.raises(UserError, match="exists and is no Diffusers model"):
        save_stable_diffusion(small_models[False], other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "model"]


def test_names_on_disk_have_text_model_in_every_transformers_version(saved_models):
    names = load_file(saved_models[False, "folder"] / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


@pytest.mark.parametrize("v2", [False, True])
def test_diffusers_opens_the_folder_offline(small_models, saved_models, v2, tmp_path):
    from diffusers import StableDiffusionPipeline

    model = small_models[v2]
    save_stable_diffusion(model, tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        assert_same_tensors(dict(getattr(pipe, part).state_dict()), dict(model.parts[part].state_dict()))
    assert pipe.scheduler.config.beta_end == 0.012 and pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert pipe("a cat", num_inference_steps=1, height=32, width=32, output_type="np").images.std() > 0


def test_folder_of_a_velocity_model_says_so(tmp_path):
    save_stable_diffusion(small_stable_diffusion(family="sd2", v_parameterization=True), tmp_path / "model")
    scheduler = json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    assert scheduler["prediction_type"] == "v_prediction"
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "model/tokenizer").iterdir()}


@pytest.mark.parametrize("v2", [False, True])
def test_diffusers_reads_our_single_file_as_we_do(small_models, saved_models, v2):
    """Their converter for single files on ours, offline, with our folder's configuration."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_single_file(
        str(saved_models[v2, "model.safetensors"]), config=str(saved_models[v2, "folder"]), local_files_only=True
    )
    for part in ("unet", "vae", "text_encoder"):
        theirs, ours = getattr(pipe, part).state_dict(), small_models[v2].parts[part].state_dict()
        assert_same_tensors(dict(theirs), dict(ours))


def test_a_folder_whose_tokenizer_cannot_be_written_is_one_line(small_models, not_utf8, tmp_path, monkeypatch):
    """tokenizers takes no path that is not UTF-8, and raises plain exceptions."""
    with pytest.raises(UserError, match=r"cannot write .*caf.*model: .*surrogates not allowed.*; check the folder, its rights"):
        save_stable_diffusion(small_models[False], not_utf8 / "model")
    assert not any(not_utf8.iterdir())

    def full(*_):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(small_models[False].tokenizers[0]), "save_pretrained", full)
    with pytest.raises(
        UserError, match=r"cannot write .*model: No space left on device \(os error 28\); check the folder, its rights"
    ):
        save_stable_diffusion(small_models[False], tmp_path / "model")
    assert not (tmp_path / "model").exists()
