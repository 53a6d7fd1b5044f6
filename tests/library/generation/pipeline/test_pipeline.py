"""library/generation/pipeline/pipeline.py: images from prompts."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reference_pipelines import SMALL, pipeline_latents

from library.diffusion.process import NoiseProcess
from library.diffusion.samplers import SAMPLERS, make_scheduler
from library.errors import UserError
from library.generation.pipeline.denoise import denoise, start_noise
from library.generation.pipeline.encoding import PromptCache
from library.generation.pipeline.latents import LatentSampler
from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.pixels import to_image
from library.generation.pipeline.settings import GenerateSettings
from library.generation.prompts.spec import PromptSpec
from library.models.clip import count_chunks
from library.models.family import Model
from library.models.modules import evaluating
from library.testing import small_stable_diffusion

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # NumPy 2 about Diffusers' code, not ours
    pytest.mark.filterwarnings(
        "ignore:The configuration file of this scheduler:FutureWarning"
    ),  # steps_offset, unused with linspace
]

CAT = PromptSpec("a photo of a cat", "blurry", width=64, height=64, seed=7, scale=5.0, steps=5)
DOG = replace(CAT, prompt="a red dog on the beach", negative_prompt="", seed=11)
LONG = ", ".join(["an old castle above the river at dawn"] * 12)  # more than 75 tokens


DISTINCT = [name for name in SAMPLERS if not name.startswith("k_")]  # "k_" is another name of the same


@pytest.mark.parametrize("sampler", DISTINCT)
def test_latents_equal_those_of_diffusers_own_pipeline(model, latents_of, sampler):
    spec = replace(CAT, sampler=sampler, steps=6)
    (ours,) = latents_of(model, [spec])
    theirs = pipeline_latents(model, make_scheduler(sampler, NoiseProcess()), spec)
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_v_prediction_and_sd2_equal_diffusers_own_pipeline(v_model, latents_of, sampler):
    spec = replace(CAT, sampler=sampler)
    (ours,) = latents_of(v_model, [spec])
    torch.testing.assert_close(
        ours, pipeline_latents(v_model, make_scheduler(sampler, NoiseProcess("v")), spec), rtol=1e-3, atol=1e-3
    )
    (noise_prediction,) = latents_of(replace(v_model, prediction="epsilon"), [spec])
    assert (noise_prediction - ours).abs().max() > 0.05


def test_other_sizes_and_no_guidance_equal_diffusers_own_pipeline(model, latents_of):
    for spec in (replace(CAT, width=72, height=128), replace(CAT, scale=1.0), replace(CAT, scale=0.5)):
        (ours,) = latents_of(model, [spec])
        assert ours.shape == (4, spec.height // 8, spec.width // 8)
        torch.testing.assert_close(
            ours, pipeline_latents(model, make_scheduler("ddim", NoiseProcess()), spec), rtol=1e-3, atol=1e-3
        )


def test_without_guidance_the_negative_prompt_has_no_effect(model, latents_of):
    one, other = latents_of(model, [replace(CAT, scale=1.0), replace(CAT, scale=1.0, negative_prompt=LONG)])
    assert torch.equal(one, other)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_2_a"])
def test_trap_6_9_same_seed_same_image_whatever_the_batch(model, latents_of, sampler):
    """Ancestral samplers too: their noise comes from the image's own seed, not from its place."""
    specs = [replace(spec, sampler=sampler, steps=3) for spec in (DOG, CAT, replace(CAT, seed=8))]
    together = latents_of(model, specs, batch_size=3)
    alone = [latents_of(model, [spec])[0] for spec in specs]
    in_twos = latents_of(model, specs[::-1], batch_size=2)[::-1]
    for batch, single, two in zip(together, alone, in_twos, strict=True):
        torch.testing.assert_close(batch, single, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(two, single, rtol=1e-3, atol=1e-3)
    assert (together[1] - together[2]).abs().max() > 0.1  # another seed is another image


def test_trap_6_10_a_long_neighbour_does_not_change_an_image(model, latents_of):
    long = replace(DOG, prompt=LONG)
    assert count_chunks(model.tokenizers[0], LONG) > 1
    torch.testing.assert_close(
        latents_of(model, [CAT, long, CAT], batch_size=3)[0], latents_of(model, [CAT])[0], rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(latents_of(model, [long, CAT], batch_size=2)[1], latents_of(model, [CAT])[0], rtol=1e-3, atol=1e-3)


def test_prompt_and_negative_prompt_are_padded_to_the_longer_of_the_two(model):
    for texts in ([CAT.prompt, LONG], [LONG, CAT.negative_prompt]):
        cache = PromptCache()
        encoded = cache.encode(model, texts, cache.chunks_needed(model, texts, 225))
        assert encoded["context"].shape[:2] == (2, 2 * 75 + 2)
    assert PromptCache().chunks_needed(model, [CAT.prompt, CAT.negative_prompt], 225) == 1


def test_what_is_cut_is_reported_once_for_each_prompt_and_names_break(model, caplog):
    cache = PromptCache()
    for _ in range(3):
        assert cache.chunks_needed(model, [LONG, "a BREAK b BREAK c"], 75) == 1
    long, breaks = [record.getMessage() for record in caplog.records]
    assert "fills 2 chunks of 75 tokens, of which 1 can be read" in long and "--max_embeddings_multiples=2" in long
    assert "fills 3 chunks of 75 tokens (BREAK begins a new one)" in breaks


def test_trap_6_3_each_image_has_its_own_negative_prompt(model, latents_of):
    specs = [replace(CAT, negative_prompt=text) for text in ("blurry", "a castle at night", "")]
    for batch, spec in zip(latents_of(model, specs, batch_size=3), specs, strict=True):
        torch.testing.assert_close(batch, latents_of(model, [spec])[0], rtol=1e-3, atol=1e-3)


def test_each_image_has_its_own_scale(model, latents_of):
    low, high = latents_of(model, [replace(CAT, scale=2.0), replace(CAT, scale=12.0)], batch_size=2)
    torch.testing.assert_close(low, latents_of(model, [replace(CAT, scale=2.0)])[0], rtol=1e-3, atol=1e-3)
    assert (low - high).abs().max() > 0.1


def test_weights_of_one_equal_no_weights(model, latents_of):
    plain, weighted, heavy = latents_of(
        model, [replace(CAT, prompt=f"a photo of {cat}") for cat in ("a cat", "(a cat:1.0)", "(a cat:1.6)")]
    )
    assert torch.equal(plain, weighted)
    assert (plain - heavy).abs().max() > 1e-3


def test_too_long_text_is_cut_with_a_message(model, caplog):
    endless = replace(CAT, prompt=", ".join([LONG] * 4), steps=1)
    with caplog.at_level(logging.WARNING):
        assert len(list(Pipeline(model).generate([endless]))) == 1
    assert "of which 3 can be read: the rest is cut" in caplog.text


def test_clip_skip_changes_the_image(model, latents_of):
    (last,), (earlier,) = latents_of(model, [CAT]), latents_of(model, [CAT], clip_skip=2)
    assert (last - earlier).abs().max() > 1e-3


def test_a_missing_seed_is_drawn_and_printed_and_gives_the_same_again(model):
    first, second = Pipeline(model, GenerateSettings(batch_size=2)).generate([replace(CAT, seed=None, steps=2)] * 2)
    assert isinstance(first.spec.seed, int) and first.spec.seed != second.spec.seed
    (again,) = (made.image for made in Pipeline(model).generate([first.spec]))
    assert np.abs(np.asarray(first.image, dtype=int) - np.asarray(again, dtype=int)).max() <= 1
    assert first.image.tobytes() != second.image.tobytes()


def test_images_come_in_order_with_their_specs_and_sizes(model):
    specs = [CAT, replace(DOG, width=72), CAT, DOG, replace(CAT, sampler="pndm", steps=3)]
    results = list(Pipeline(model, GenerateSettings(batch_size=2)).generate([replace(spec, steps=2) for spec in specs]))
    assert [(spec.prompt, spec.width) for spec in (made.spec for made in results)] == [
        (spec.prompt, spec.width) for spec in specs
    ]
    assert all(
        image.size == (spec.width, spec.height) and image.mode == "RGB"
        for spec, image in ((made.spec, made.image) for made in results)
    )


@pytest.mark.parametrize("sampler", DISTINCT)
@pytest.mark.parametrize("steps", [1, 2])
def test_very_few_steps_work(model, sampler, steps):
    (image,) = (made.image for made in Pipeline(model).generate([replace(CAT, sampler=sampler, steps=steps)]))
    assert np.asarray(image).std() > 0


def test_neither_random_state_nor_modes_nor_gradients_of_the_caller_change(model):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    model.denoiser.train()
    model.denoiser.mid_block.eval()
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    modes = [part.training for part in model.denoiser.modules()]
    for _ in Pipeline(model).generate([replace(CAT, seed=None, sampler="euler_a", steps=2)] * 2):
        assert torch.is_grad_enabled()  # also between two images
        assert [part.training for part in model.denoiser.modules()] == modes
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    model.denoiser.eval()


def test_modes_come_back_after_an_error():
    layer = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    with pytest.raises(RuntimeError), evaluating(layer):
        assert not layer[0].training
        raise RuntimeError
    assert layer.training and layer[0].training and not layer[1].training


def test_dropout_is_off_while_images_are_made(latents_of):
    model = small_stable_diffusion(seed=0, **SMALL)
    expected = latents_of(model, [CAT])[0]
    model.denoiser.mid_block.resnets[0].dropout.p = 0.9
    model.denoiser.train()
    assert torch.equal(latents_of(model, [CAT])[0], expected)


def test_broken_weights_are_named_and_the_other_images_go_on(model):
    broken = replace(model, parts={**model.parts, "unet": small_stable_diffusion(seed=0, **SMALL).denoiser})
    with torch.no_grad():
        broken.denoiser.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"'a photo of a cat' \(seed 7\) gave NaN or infinite latents"):
        list(Pipeline(broken).generate([CAT]))
    failed = []
    assert (
        list(
            Pipeline(broken, GenerateSettings(batch_size=2)).generate(
                [CAT, DOG], on_error=lambda one: failed.append(one.spec.prompt)
            )
        )
        == []
    )
    assert failed == [CAT.prompt, DOG.prompt]


def test_a_vae_that_overflows_is_named(model):
    broken = replace(model, parts={**model.parts, "vae": small_stable_diffusion(seed=0, **SMALL).vae})
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias.fill_(float("inf"))
        broken.vae.decoder.conv_out.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="black image.*VAE.*--vae") as error:
        list(Pipeline(broken).generate([replace(CAT, steps=1)]))
    assert "no_half_vae" not in str(error.value)  # it is in float32 already
    broken.vae.to(torch.bfloat16)
    with pytest.raises(UserError, match="black image.*VAE overflows in torch.bfloat16.*--no_half_vae"):
        list(Pipeline(broken).generate([replace(CAT, steps=1)]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 70}, "70 x 64.*multiples of 8"),
        ({"height": 0}, "64 x 0"),
        ({"steps": 0}, "0 steps"),
        ({"sampler": "eula"}, "did you mean 'euler_a'"),
    ],
)
def test_wrong_specs_are_one_line_and_do_not_stop_the_others(model, wrong, message):
    failures = []
    specs = [replace(CAT, steps=1), replace(CAT, **wrong), replace(CAT, steps=1)]
    results = list(Pipeline(model).generate(specs, on_error=lambda one: failures.append(one)))
    assert [made.index for made in results] == [0, 2] and [failed.index for failed in failures] == [1]
    with pytest.raises(UserError, match=message):
        list(Pipeline(model).generate(specs))


def test_what_nobody_foresaw_ends_its_images_and_not_the_run(model, monkeypatch):
    sample, errors = LatentSampler.sample, iter([RuntimeError("cuDNN error"), torch.cuda.OutOfMemoryError("no"), None])

    def failing(self, *args, **options):
        if error := next(errors):
            raise error
        return sample(self, *args, **options)

    monkeypatch.setattr(LatentSampler, "sample", failing)
    failed = []
    specs = [replace(CAT, steps=1)] * 3
    made = list(Pipeline(model).generate(specs, on_error=lambda one: failed.append(str(one.error))))
    assert len(made) == 1 and len(failed) == 2
    assert "RuntimeError: cuDNN error" in failed[0] and "not enough GPU memory for 1 image of 64 x 64" in failed[1]
    errors = iter([RuntimeError("a bug")])
    with pytest.raises(RuntimeError, match="a bug"):  # a traceback, where nobody waits for the other images
        list(Pipeline(model).generate(specs))


def test_images_are_decoded_together_as_asked_and_one_by_one_where_memory_is_short(model, monkeypatch):
    sizes, decode = [], Model.decode

    def decoding(model, latents, most=9):
        sizes.append(len(latents))
        if len(latents) > most:
            raise torch.cuda.OutOfMemoryError("no")
        return decode(model, latents)

    monkeypatch.setattr(Model, "decode", decoding)
    specs = [replace(CAT, steps=1, seed=seed) for seed in range(4)]
    for wanted, expected in ((None, [4]), (3, [3, 1]), (0.5, [2, 2]), (0.1, [1, 1, 1, 1])):
        sizes.clear()
        assert len(list(Pipeline(model, GenerateSettings(batch_size=4, vae_batch_size=wanted)).generate(specs))) == 4
        assert sizes == expected
    monkeypatch.setattr(Model, "decode", lambda model, latents: decoding(model, latents, most=1))
    sizes.clear()
    assert len(list(Pipeline(model, GenerateSettings(batch_size=4)).generate(specs))) == 4
    assert sizes == [4, 1, 1, 1, 1]


def test_progress_adds_up_to_the_number_of_images(model):
    done = []
    list(
        Pipeline(model, GenerateSettings(batch_size=2)).generate(
            [CAT, DOG, replace(CAT, sampler="heun", steps=3)], progress=done.append
        )
    )
    assert sum(done) == pytest.approx(3) and len(done) == 5 + 5


def test_autocast_is_entered(model):
    tiny = [replace(CAT, steps=1)]
    seen = []

    class Context:
        def __enter__(self):
            seen.append("in")

        def __exit__(self, *_):
            seen.append("out")

    list(Pipeline(model, GenerateSettings(autocast=Context)).generate(tiny))
    assert seen == ["in", "out"]


def test_trap_5_13_the_noise_does_not_depend_on_the_device():
    """Images are made wherever the models are (here: the CPU), and start noise is always drawn on the CPU."""
    noise = start_noise([torch.Generator("cpu").manual_seed(3)], 4, 8, 8)
    assert noise.device.type == "cpu" and noise.dtype == torch.float32
    assert torch.equal(noise, torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_trap_5_13_gpu_and_cpu_make_the_same_image(model, latents_of):
    specs = [replace(CAT, sampler=sampler) for sampler in SAMPLERS]
    on_cpu = latents_of(model, specs)
    for part in (model.denoiser, model.text_encoders[0], model.vae):
        part.to("cuda")
    try:
        on_gpu = latents_of(model, specs, batch_size=2)
    finally:
        for part in (model.denoiser, model.text_encoders[0], model.vae):
            part.to("cpu")
    for sampler, one, other in zip(SAMPLERS, on_cpu, on_gpu, strict=True):
        assert (one - other.cpu()).abs().max() < 0.02, sampler


def test_pixels_are_rounded_and_clipped():
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 3.0]).view(1, 2, 3).repeat(3, 1, 1)
    image = to_image(pixels)
    assert isinstance(image, Image.Image) and image.size == (3, 2)
    assert [pixel[0] for pixel in image.get_flattened_data()] == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize("sampler", DISTINCT)
def test_trap_6_9_every_sampler_draws_from_the_images_own_generators(sampler):
    def run(batch):
        scheduler = make_scheduler(sampler, NoiseProcess())
        scheduler.set_timesteps(6)
        generators = [torch.Generator().manual_seed(seed) for seed in batch]
        noise = start_noise(generators, 4, 4, 4) * scheduler.init_noise_sigma
        return denoise(lambda noisy, timestep: noisy * 0.5, scheduler, noise, generators=generators)

    state = torch.get_rng_state()
    torch.testing.assert_close(run([5, 6, 7])[1], run([6])[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler", ["lms", "heun", "dpm_2_a", "pndm", "dpmsolver++", "dpmsingle"])
def test_a_sampler_that_was_used_before_remembers_nothing(model, latents_of, sampler):
    spec = replace(CAT, sampler=sampler, steps=3)
    first, _, again = latents_of(model, [spec, replace(DOG, sampler=sampler, steps=2), spec])
    assert torch.equal(first, again)
