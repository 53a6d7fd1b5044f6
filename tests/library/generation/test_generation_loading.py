"""library/generation/loading.py: the model for a run of images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference_pipelines import pipeline_latents

from library.diffusion.process import NoiseProcess
from library.diffusion.samplers import make_scheduler
from library.errors import UserError
from library.generation.loading import load_model
from library.generation.options import ModelOptions, SpeedOptions
from library.generation.pipeline.pipeline import Pipeline
from library.generation.prompts.spec import PromptSpec
from library.models.saving import save_stable_diffusion

CAT = PromptSpec("a cat", "blurry", width=64, height=64, seed=7, steps=2)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy 2 about Diffusers' code, not ours
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small-v1.safetensors"
    save_stable_diffusion(model, path)
    return path


def load(path, **speed):
    return load_model(ModelOptions(ckpt=str(path)), SpeedOptions(**speed), device="cpu")


def test_pattern_precision_and_layout(saved, model, latents_of):
    loaded = load(saved.parent / "small-v*.safetensors", opt_channels_last=True)
    assert loaded.denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for ours, expected in zip(latents_of(loaded, [CAT]), latents_of(model, [CAT]), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)
    half = load(saved, bf16=True, no_half_vae=True)
    assert half.denoiser.dtype == half.text_encoders[0].dtype == torch.bfloat16 and half.vae.dtype == torch.float32


def test_xformers_without_a_gpu_is_reported_and_makes_the_same(saved, model, latents_of, capsys):
    loaded = load(saved, xformers=True)
    assert "--xformers" in capsys.readouterr().out  # there is no GPU here, and that is told
    torch.testing.assert_close(latents_of(loaded, [CAT])[0], latents_of(model, [CAT])[0], **CLOSE)


def test_tiles_of_the_vae_make_nearly_the_same_image(saved):
    tiled = load(saved, vae_tiling=True)
    tiled.vae.tile_latent_min_size, tiled.vae.tile_sample_min_size = 8, 64  # the real ones are 64 and 512
    spec = replace(CAT, width=128, height=128, steps=1)
    (image,) = (made.image for made in Pipeline(tiled).generate([spec]))
    tiled.vae.disable_tiling()
    (whole,) = (made.image for made in Pipeline(tiled).generate([spec]))
    assert image.size == (128, 128) and image.tobytes() != whole.tobytes()


def test_wrong_models_are_one_line(saved, tmp_path):
    for name in ("a1", "a2"):
        (tmp_path / name).touch()
    for ckpt, message in ((tmp_path / "a*", "matches 2 files, such as .*a1 and .*a2"), (tmp_path / "b*", "matches no file")):
        with pytest.raises(UserError, match=message):
            load(ckpt)
    with pytest.raises(UserError, match="--fp16 needs a GPU"):
        load(saved, fp16=True)


def test_a_folder_is_drawn_as_its_scheduler_predicts_and_one_line_says_so(v_model, tmp_path, capsys):
    save_stable_diffusion(v_model, tmp_path / "model")
    chosen = ModelOptions(ckpt=str(tmp_path / "model"), v2=True)
    assert load_model(chosen, SpeedOptions()).prediction == "v"
    assert capsys.readouterr().out == "the model predicts velocity, as its files say: drawn so\n"
    load_model(chosen.model_copy(update={"v_parameterization": True}), SpeedOptions())
    assert not capsys.readouterr().out


def test_the_line_names_zero_terminal_snr_too(saved, model, tmp_path, capsys):
    load(saved)
    assert not capsys.readouterr().out
    save_stable_diffusion(replace(model, prediction="v", zero_terminal_snr=True), tmp_path / "model")
    load(tmp_path / "model")
    assert "the model predicts velocity, zero terminal SNR, as its files say" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmsolver++"])
def test_zero_terminal_snr_equals_diffusers_pipeline(v_model, latents_of, sampler):
    spec = replace(CAT, sampler=sampler)
    (ours,) = latents_of(v_model, [spec], zero_terminal_snr=True)
    scheduler = make_scheduler(sampler, NoiseProcess("v", zero_terminal_snr=True))
    torch.testing.assert_close(ours, pipeline_latents(v_model, scheduler, spec), **CLOSE)
    assert (latents_of(v_model, [spec])[0] - ours).abs().max() > 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_gpu(saved, precision):
    model = load_model(ModelOptions(ckpt=str(saved)), SpeedOptions(no_half_vae=True, **{precision: True}))
    assert len(list(Pipeline(model).generate([CAT, replace(CAT, sampler="euler_a")]))) == 2
