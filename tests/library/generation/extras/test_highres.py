"""library/generation/extras/highres.py: a small image first, then the same enlarged and painted over."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from reference_pipelines import an_image, make_pipeline, run_pipeline
from torch.nn import functional as F

from library.diffusion.process import NoiseProcess
from library.diffusion.samplers import make_scheduler
from library.errors import UserError
from library.generation.extras.highres import Highres, load_upscaler
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.spec import PromptSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CAT = PromptSpec("a cat", "blurry", width=128, height=64, seed=7, scale=5.0, steps=4, strength=0.5)
HALF = Highres(0.5, steps=2)
CLOSE = {"rtol": 1e-3, "atol": 2e-3}


def test_trap_6_5_the_second_stage_is_img2img_of_the_enlarged_first_with_seed_plus_one(model, latents_of):
    first, second = [*Pipeline(model, GenerateSettings(highres=replace(HALF, save_first_stage=True))).generate([CAT])]
    assert (first.stage, second.stage) == (0, 1) and first.image.size == (64, 32) and second.image.size == (128, 64)
    assert first.spec == second.spec == CAT  # seed s for both
    (alone,) = (made.image for made in Pipeline(model).generate([replace(CAT, width=64, height=32, steps=2)]))
    assert alone.tobytes() == first.image.tobytes()

    pipe = make_pipeline("Img2Img", model, make_scheduler("ddim", NoiseProcess()))
    enlarged = alone.resize((128, 64), Image.Resampling.LANCZOS)
    theirs = run_pipeline(pipe, replace(CAT, seed=8), image=enlarged, strength=0.5)
    with torch.no_grad():
        pixels = model.vae.decode(theirs[None] / model.vae.config.scaling_factor).sample[0]
    expected = ((pixels.clamp(-1, 1) / 2 + 0.5) * 255).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(second.image) - expected).max() < 2


@pytest.mark.parametrize("save", [False, True])
def test_trap_6_5_latents_are_enlarged_and_the_first_stage_can_be_saved_too(model, latents_of, save):
    small = latents_of(model, [replace(CAT, width=64, height=32, steps=2)])[0]
    highres = replace(HALF, latent_upscaling=True, save_first_stage=save)
    *first, final = latents_of(model, [CAT], highres=highres)
    assert len(first) == int(save)
    no_steps = latents_of(model, [replace(CAT, strength=0.0)], highres=highres)[-1]
    torch.testing.assert_close(no_steps, F.interpolate(small[None], (8, 16), mode="bilinear")[0])
    assert (final - no_steps).abs().max() > 0.05


def test_trap_6_5_sizes_that_32_does_not_divide(model):
    for latent_upscaling in (False, True):
        spec = replace(CAT, width=136, height=72, steps=2)
        (image,) = (
            made.image
            for made in Pipeline(
                model, GenerateSettings(highres=replace(HALF, steps=1, latent_upscaling=latent_upscaling))
            ).generate([spec])
        )
        assert image.size == (136, 72)


def test_a_batch_makes_what_each_makes_alone(model, latents_of):
    specs = [CAT, replace(CAT, seed=9)]
    highres = replace(HALF, latent_upscaling=True)
    together = latents_of(model, specs, highres=highres, batch_size=2, vae_batch_size=0.5)
    for one, spec in zip(together, specs, strict=True):
        torch.testing.assert_close(one, latents_of(model, [spec], highres=highres)[0], **CLOSE)


def test_first_stages_of_a_batch_come_before_its_images_and_progress_adds_up(model):
    done = []
    specs = [replace(CAT, steps=2, seed=seed) for seed in (1, 2, 3)]
    made = list(
        Pipeline(model, GenerateSettings(highres=replace(HALF, steps=3, save_first_stage=True), batch_size=2)).generate(
            specs, progress=done.append
        )
    )
    assert [(one.spec.seed, one.stage) for one in made] == [(1, 0), (2, 0), (1, 1), (2, 1), (3, 0), (3, 1)]
    assert sum(done) == pytest.approx(3)


def test_from_an_image_the_first_stage_has_its_own_strength(model, tmp_path):
    an_image((128, 64)).save(tmp_path / "source.png")
    spec = replace(CAT, image=tmp_path / "source.png")
    highres = replace(HALF, strength=0.0, save_first_stage=True)
    first, _ = Pipeline(model, GenerateSettings(highres=highres)).generate([spec])
    assert first.image.tobytes() == an_image((128, 64)).resize((64, 32), Image.Resampling.LANCZOS).tobytes()


def test_trap_6_8_a_mask_keeps_its_pixels_through_both_stages(model, tmp_path):
    an_image((128, 64)).save(tmp_path / "source.png")
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 64:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for latent_upscaling in (False, True):
        spec = replace(CAT, image=tmp_path / "source.png", mask=tmp_path / "mask.png")
        (image,) = (
            made.image
            for made in Pipeline(model, GenerateSettings(highres=replace(HALF, latent_upscaling=latent_upscaling))).generate(
                [spec]
            )
        )
        assert np.array_equal(np.asarray(image)[:, :64], np.asarray(an_image((128, 64)))[:, :64])


def test_wrong_settings_are_one_line(model):
    for wrong, message in (({"scale": 0}, "highres_fix_scale 0"), ({"scale": 1.5}, "1.5"), ({"scale": 1, "steps": 0}, "steps 0")):
        with pytest.raises(UserError, match=message):
            Highres(**wrong)
    with pytest.raises(UserError, match="128 x 64; give a larger one"):
        list(Pipeline(model, GenerateSettings(highres=Highres(0.2))).generate([CAT]))
    with pytest.raises(UserError, match="--highres_fix_upscaler no_such_module"):
        load_upscaler("no_such_module", None, model)
    with pytest.raises(UserError, match="has no create_upscaler"):
        load_upscaler("library.errors", None, model)


@pytest.mark.parametrize("wants_latents", [False, True])
def test_an_upscaler_of_ones_own(model, monkeypatch, wants_latents):
    class Upscaler(torch.nn.Linear):
        def support_latents(self):
            return wants_latents

        def upscale(self, vae, images, latents, dtype, width, height, batch_size=1, vae_batch_size=1):
            assert (images is None) == wants_latents and (latents is None) != wants_latents and batch_size == 2
            if wants_latents:
                return torch.zeros(2, 4, height // 8, width // 8)
            return [Image.new("RGB", (width, height), "red") for _ in images]

    module = ModuleType("my_upscaler")
    module.create_upscaler = lambda size="1": Upscaler(int(size), 1)
    monkeypatch.setitem(sys.modules, "my_upscaler", module)
    with pytest.raises(UserError, match="--highres_fix_upscaler_args: expected key=value"):
        load_upscaler("my_upscaler", "weights", model)
    with pytest.raises(UserError, match="did you mean 'size'"):
        load_upscaler("my_upscaler", "sise=1", model)
    highres = replace(HALF, upscaler=load_upscaler("my_upscaler", "size=2", model))
    made = list(Pipeline(model, GenerateSettings(highres=highres, batch_size=2)).generate([replace(CAT, strength=0.0)] * 2))
    assert len(made) == 2
    if not wants_latents:
        assert made[0].image.getpixel((5, 5)) == (255, 0, 0)
