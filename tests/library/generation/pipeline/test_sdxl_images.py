"""Images with SDXL: equal to Diffusers' pipeline, with everything that images of other families may have."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reference_pipelines import an_image

from library.diffusion.samplers import SAMPLERS, make_scheduler
from library.errors import UserError
from library.generation.extras.highres import Highres
from library.generation.extras.networks import Networks
from library.generation.extras.regional import Regions
from library.generation.options import NetworkOptions
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.generation.pipeline.sizes import default_size
from library.generation.prompts.spec import DeepShrink, PromptSpec, SizeConditioning
from library.models.loading import load_stable_diffusion
from library.models.saving import save_stable_diffusion
from library.testing import small_sdxl, small_stable_diffusion
from networks import lora

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CAT = PromptSpec("a photo of a cat", "blurry", width=64, height=96, seed=7, scale=5.0, steps=6)
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
DISTINCT = [name for name in SAMPLERS if not name.startswith("k_")]
# What stabilityai/stable-diffusion-xl-base-1.0 has in scheduler_config.json.
PUBLISHED = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
    "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
    "use_karras_sigmas": False,
}  # fmt: skip
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def xl():
    return small_sdxl()


def scheduler_of(sampler: str, config: dict):
    """Diffusers' scheduler for a sampler, made from the configuration of a pipeline's, as its users make it."""
    import diffusers

    chosen = SAMPLERS[sampler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, chosen.scheduler).from_config(config, **chosen.settings)
    return scheduler


def pipeline_latents(model, scheduler, spec: PromptSpec, kind: str = "", **options) -> torch.Tensor:
    """The latents (C, h, w) of `StableDiffusionXLPipeline` or a relative of it."""
    import diffusers

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    parts = (model.vae, *model.text_encoders, *model.tokenizers, model.denoiser, scheduler)
    pipe = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")(*parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    if not kind:
        options |= {"width": spec.width, "height": spec.height}
    return pipe(
        prompt=spec.prompt, negative_prompt=spec.negative_prompt, num_inference_steps=spec.steps, guidance_scale=spec.scale,
        generator=torch.Generator("cpu").manual_seed(spec.seed), output_type="latent", **options,
    ).images[0]  # fmt: skip


@pytest.mark.parametrize("sampler", [name for name in DISTINCT if name != "lms"])  # Diffusers' own needs scipy
def test_latents_equal_those_of_diffusers_pipeline_with_the_published_scheduler(xl, latents_of, sampler):
    (ours,) = latents_of(xl, [replace(CAT, sampler=sampler)])
    theirs = pipeline_latents(xl, scheduler_of(sampler, PUBLISHED), CAT)
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_lms_has_the_published_timesteps_too(xl, latents_of):
    scheduler = make_scheduler("lms", xl.process())
    scheduler.set_timesteps(6)
    assert (
        scheduler.timesteps.tolist() == [831, 665, 499, 333, 167, 1] and len(latents_of(xl, [replace(CAT, sampler="lms")])) == 1
    )


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpmsolver++"])
def test_zero_terminal_snr_begins_at_the_last_timestep(latents_of, sampler):
    model = replace(small_sdxl(seed=1, v_parameterization=True), zero_terminal_snr=True)
    (ours,) = latents_of(model, [replace(CAT, sampler=sampler)])
    theirs = pipeline_latents(model, scheduler_of(sampler, PUBLISHED | ZERO_SNR), CAT)
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_folder_is_sampled_as_its_own_scheduler_says(xl, latents_of, tmp_path):
    save_stable_diffusion(xl, tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert (saved["timestep_spacing"], saved["steps_offset"]) == ("leading", 1)
    own = PUBLISHED | {"timestep_spacing": "trailing", "beta_end": 0.011}
    file.write_text(json.dumps(own), encoding="utf-8")
    model = load_stable_diffusion(str(tmp_path / "model"))
    for sampler in ("ddim", "euler", "dpmsolver++"):
        (ours,) = latents_of(model, [replace(CAT, sampler=sampler)])
        torch.testing.assert_close(ours, pipeline_latents(model, scheduler_of(sampler, own), CAT), **CLOSE)
        assert (ours - latents_of(xl, [replace(CAT, sampler=sampler)])[0]).abs().max() > 0.01


def test_size_conditioning_is_that_of_diffusers(xl, latents_of):
    told = SizeConditioning(300, 200, 40, 30, 8, 16)
    (ours,) = latents_of(xl, [replace(CAT, sizes=told)])
    theirs = pipeline_latents(
        xl, scheduler_of("ddim", PUBLISHED), CAT, original_size=(200, 300), crops_coords_top_left=(8, 16),
        negative_original_size=(30, 40), negative_crops_coords_top_left=(8, 16), negative_target_size=(96, 64),
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, **CLOSE)
    (plain,) = latents_of(xl, [CAT])
    assert (ours - plain).abs().max() > 1e-3
    together = latents_of(xl, [replace(CAT, sizes=told), CAT], batch_size=2)  # each image of a batch has its own
    torch.testing.assert_close(together[0], ours, **CLOSE)
    torch.testing.assert_close(together[1], plain, **CLOSE)


def test_sizes_left_open_are_the_size_of_the_image_and_that_of_the_prompt():
    assert SizeConditioning().rows(64, 96) == ([96, 64, 0, 0, 96, 64], [96, 64, 0, 0, 96, 64])
    assert SizeConditioning(original_width=10, crop_left=3).rows(64, 96) == ([96, 10, 0, 3, 96, 64], [96, 10, 0, 3, 96, 64])
    assert SizeConditioning(original_height_negative=7).rows(64, 96)[1] == [7, 64, 0, 0, 96, 64]


def test_a_model_without_size_conditioning_refuses_sizes():
    spec = replace(CAT, sizes=SizeConditioning(original_width=300, crop_top=8))
    with pytest.raises(UserError, match="--original_width, --crop_top: SD 1.x models take no size conditioning; leave it out"):
        list(Pipeline(small_stable_diffusion()).generate([spec]))


def test_the_size_of_the_full_model_is_1024():
    model = small_sdxl()
    model.denoiser.register_to_config(sample_size=128)
    model.vae.register_to_config(block_out_channels=[32] * 4)
    assert default_size(model) == (1024, 1024)


def test_from_an_image_equals_diffusers_pipeline(xl, latents_of, tmp_path):
    an_image((64, 96)).save(tmp_path / "source.png")
    spec = replace(CAT, image=tmp_path / "source.png", strength=0.5)
    (ours,) = latents_of(xl, [spec])
    theirs = pipeline_latents(xl, scheduler_of("ddim", PUBLISHED), CAT, "Img2Img", image=an_image((64, 96)), strength=0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)


def test_two_stages_deep_shrink_and_a_scale_of_the_negative_prompt(xl, latents_of):
    large = replace(CAT, width=128, height=128, steps=2)
    (plain,) = latents_of(xl, [large])
    highres = GenerateSettings(highres=Highres(0.5, steps=2, save_first_stage=True))
    assert [made.image.size for made in Pipeline(xl, highres).generate([large])] == [(64, 64), (128, 128)]
    (shrunk,) = latents_of(xl, [replace(large, deep_shrink=DeepShrink(2, 0))])
    assert (shrunk - plain).abs().max() > 0.05
    with pytest.raises(UserError, match="--ds_depth_1 3: the U-Net has the depths 0 to 2"):
        list(Pipeline(xl).generate([replace(large, deep_shrink=DeepShrink(3))]))
    (scaled,) = latents_of(xl, [replace(large, negative_scale=2.0)])
    assert (scaled - plain).abs().max() > 0.05


def test_regions_on_sdxl(xl, latents_of, tmp_path):
    """One region over everything is the network as usual; two act each in its half."""
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = lora.create_network(1.0, 2, 2, None, *xl.for_networks(), conv_dim="2", conv_alpha="2")
        for part in network.loras:
            torch.nn.init.normal_(part.lora_up.weight, std=0.15)
        network.save_weights(tmp_path / f"{seed}.safetensors", torch.float32, {})
        files.append(str(tmp_path / f"{seed}.safetensors"))
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "red.png")
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, :32, 0] = halves[:, 32:, 1] = 255
    Image.fromarray(halves).save(tmp_path / "halves.png")

    networks = Networks.load(xl, NetworkOptions(network_weights=files[:1]))
    spec = replace(CAT, prompt="a cat", height=64, scale=1.0, steps=2)
    (usual,) = latents_of(xl, [spec], networks=networks)
    (region,) = latents_of(xl, [spec], networks=networks, regions=Regions.load(tmp_path / "red.png", networks))
    torch.testing.assert_close(region, usual, rtol=2e-3, atol=2e-3)
    networks.close()
    assert (latents_of(xl, [spec])[0] - usual).abs().max() > 0.05

    networks = Networks.load(xl, NetworkOptions(network_weights=files))
    regions = Regions.load(tmp_path / "halves.png", networks)
    spec = replace(CAT, prompt="a cat AND a dog", height=64, steps=1)
    assert len(list(Pipeline(xl, GenerateSettings(networks=networks, regions=regions)).generate([spec]))) == 1
    loras = {lora.lora_name: lora for lora in networks.loaded[1].network.loras}
    with torch.no_grad(), regions.acting(xl.denoiser, 1, 2, 1, 8, 8):
        layer = loras["lora_unet_input_blocks_1_0_in_layers_2"](torch.randn(2, 32, 8, 8))
        embedding = loras["lora_unet_input_blocks_1_0_emb_layers_1"](torch.randn(2, 128))
    networks.close()
    assert layer[..., :4].eq(0).all() and layer[..., 4:].ne(0).all() and embedding.ne(0).all()


def test_trap_24_a_vae_that_overflows_is_named_with_the_one_that_does_not():
    model = small_sdxl()
    with torch.no_grad():
        model.vae.decoder.conv_out.bias.fill_(float("nan"))
    model.vae.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"black image: .*--no_half_vae\) or give --vae=madebyollin/sdxl-vae-fp16-fix"):
        list(Pipeline(model).generate([replace(CAT, steps=1)]))
