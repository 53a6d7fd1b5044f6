"""library/generation/extras/image_input.py: img2img and in-painting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reference_pipelines import SMALL, an_image, make_pipeline, run_pipeline

from library.diffusion.process import NoiseProcess
from library.diffusion.samplers import SAMPLERS, make_scheduler
from library.errors import UserError
from library.generation.extras.image_input import load_image, load_mask, run_steps, source_size
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.spec import PromptSpec
from library.testing import small_stable_diffusion

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The configuration file:FutureWarning")

CLOSE = {"rtol": 1e-3, "atol": 2e-3}
DISTINCT = [name for name in SAMPLERS if not name.startswith("k_")]


@pytest.fixture
def spec(tmp_path):
    an_image().save(tmp_path / "source.png")
    return PromptSpec(
        "a cat", "blurry", width=64, height=64, seed=7, scale=5.0, steps=5, strength=0.6, image=tmp_path / "source.png"
    )


@pytest.fixture
def mask(tmp_path):
    """White in the right half."""
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, 32:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.mark.parametrize("sampler", DISTINCT)
def test_latents_equal_those_of_diffusers_img2img_pipeline(model, latents_of, spec, sampler):
    spec = replace(spec, sampler=sampler)
    (ours,) = latents_of(model, [spec])
    pipe = make_pipeline("Img2Img", model, make_scheduler(sampler, NoiseProcess()))
    theirs = run_pipeline(pipe, spec, image=an_image(), strength=spec.strength)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize(
    ("sampler", "strength"), [("ddim", 0.6), ("euler", 0.6), ("heun", 0.8), ("dpmsolver++", 1.0), ("pndm", 0.8)]
)
def test_latents_equal_those_of_diffusers_inpainting_pipeline(model, latents_of, spec, mask, sampler, strength):
    spec = replace(spec, sampler=sampler, strength=strength, mask=mask)
    (ours,) = latents_of(model, [spec])
    pipe = make_pipeline("Inpaint", model, make_scheduler(sampler, NoiseProcess()))
    options = {"image": an_image(), "mask_image": Image.open(mask), "strength": strength, "height": 64, "width": 64}
    torch.testing.assert_close(ours, run_pipeline(pipe, spec, **options), **CLOSE)


def test_trap_6_7_no_steps_give_the_source_image(model, spec):
    for strength in (0.0, 0.19):  # floor(5 * 0.19) = 0
        done = []
        (image,) = (made.image for made in Pipeline(model).generate([replace(spec, strength=strength)], progress=done.append))
        assert image.tobytes() == an_image().tobytes()
        assert sum(done) == 1
    (image,) = (made.image for made in Pipeline(model).generate([replace(spec, strength=0.2)]))
    assert image.tobytes() != an_image().tobytes()


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_trap_6_8_what_the_mask_keeps_has_the_very_pixels_of_the_source(model, spec, mask, strength):
    (image,) = (made.image for made in Pipeline(model).generate([replace(spec, mask=mask, strength=strength)]))
    source, made = np.asarray(an_image()), np.asarray(image)
    assert np.array_equal(made[:, :32], source[:, :32])
    assert np.abs(made[:, 32:].astype(int) - source[:, 32:]).mean() > 5


def test_a_grey_mask_mixes(model, spec, mask, tmp_path):
    Image.new("L", (64, 64), 128).save(tmp_path / "grey.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "white.png")
    specs = [replace(spec, mask=tmp_path / name) for name in ("grey.png", "white.png")]
    grey, white = (made.image for made in Pipeline(model, GenerateSettings(batch_size=2)).generate(specs))
    source = np.asarray(an_image()).astype(int)
    assert 0 < np.abs(np.asarray(grey) - source).mean() < np.abs(np.asarray(white) - source).mean()


def test_every_image_of_a_batch_has_its_own_source(model, latents_of, spec, tmp_path):
    an_image(seed=1).save(tmp_path / "other.png")
    specs = [spec, replace(spec, image=tmp_path / "other.png", seed=8)]
    for together, single in zip(
        latents_of(model, specs, batch_size=2), (latents_of(model, [one])[0] for one in specs), strict=True
    ):
        torch.testing.assert_close(together, single, **CLOSE)


def test_a_sampler_that_began_later_begins_at_its_start_again(model, latents_of, spec):
    for sampler in ("heun", "lms", "dpmsolver++", "dpmsingle"):
        from_noise = replace(spec, image=None, sampler=sampler, steps=3)
        first, _, again = latents_of(model, [from_noise, replace(spec, sampler=sampler), from_noise])
        assert torch.equal(first, again)


def test_a_broken_source_fails_alone(model, spec, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    specs = [replace(spec, steps=2, image=path) for path in (spec.image, tmp_path / "broken.png", tmp_path / "no")]
    failed = []
    made = list(
        Pipeline(model, GenerateSettings(batch_size=3)).generate(specs, on_error=lambda one: failed.append(str(one.error)))
    )
    assert len(made) == 1 and len(failed) == 2
    assert "--image_path" in failed[0] and "broken.png: no image" in failed[0] and "no: No such file" in failed[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"strength": 1.5}, "strength 1.5"), ({"image": None, "mask": "m.png"}, "a mask needs"), ({"mask": "black"}, "black all")],
)
def test_wrong_requests_are_named(model, spec, tmp_path, change, message):
    if change.get("mask") == "black":
        Image.new("L", (64, 64), 0).save(tmp_path / "black.png")
        change = {"mask": tmp_path / "black.png"}
    with pytest.raises(UserError, match=message):
        list(Pipeline(model).generate([replace(spec, **change)]))


def test_a_vae_that_overflows_on_the_source_is_named(model, spec):
    broken = replace(model, parts={**model.parts, "vae": small_stable_diffusion(seed=0, **SMALL).vae})
    with torch.no_grad():
        broken.vae.encoder.conv_in.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="VAE overflows.*no_half_vae"):
        list(Pipeline(broken).generate([spec]))


def test_sizes_of_sources(tmp_path):
    turned = an_image((100, 70))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert source_size(tmp_path / "turned.jpg") == (64, 96)  # upright it is 70 x 100
    assert load_image(tmp_path / "turned.jpg", (64, 96)).size == (64, 96)
    an_image((64, 20)).save(tmp_path / "flat.png")
    with pytest.raises(UserError, match="flat.png: 64 x 20 pixels are too few"):
        source_size(tmp_path / "flat.png")
    with pytest.raises(UserError, match="--image_path"):
        source_size(tmp_path / "missing.png")
    an_image((64, 20)).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png", (32, 32)).size == (32, 32)


def test_what_is_erased_in_a_mask_is_kept(tmp_path):
    strokes = np.zeros((8, 8, 4), np.uint8)
    strokes[:, :, :3] = 255  # white everywhere, and transparent but for the right half
    strokes[:, 4:, 3] = 255
    Image.fromarray(strokes).save(tmp_path / "mask.png")
    assert np.asarray(load_mask(tmp_path / "mask.png", (8, 8)))[:, [0, 7]].tolist() == [[0, 255]] * 8


def test_steps_are_counted_as_diffusers_counts():
    assert [run_steps(10, strength) for strength in (0, 0.09, 0.1, 0.79, 0.8, 1)] == [0, 0, 1, 7, 8, 10]
