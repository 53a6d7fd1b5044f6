from __future__ import annotations

import pytest
import torch

from library.models.architecture import sd2_configs, sd15_configs
from library.models.clip import tokenize
from library.models.model import decode_latents, encode_image, encode_text, predict_noise, vae_fingerprint
from library.models.parts import empty_text_encoder, empty_unet
from library.testing import small_stable_diffusion


def module_names(module):
    return {name for name, _ in module.named_modules()}


@pytest.mark.parametrize("v2", [False, True])
def test_blocks_are_those_of_the_real_model(small_models, v2):
    configs = sd2_configs() if v2 else sd15_configs()
    small, full = module_names(small_models[v2].unet), module_names(empty_unet(configs["unet"]))
    assert small == full
    text = empty_text_encoder(configs["text_encoder"])
    assert module_names(small_models[v2].text_encoder) < module_names(text)
    assert small_models[v2].text_encoder.config.vocab_size == 49408


def test_same_seed_same_weights_other_seed_other_weights(small_models):
    again, other = small_stable_diffusion(seed=1), small_stable_diffusion(seed=2)
    assert vae_fingerprint(again.vae) == vae_fingerprint(small_models[False].vae) != vae_fingerprint(other.vae)
    first = again.unet.state_dict()
    assert all(torch.equal(first[name], value) for name, value in small_models[False].unet.state_dict().items())


def test_weights_are_the_same_on_every_machine():
    """Numbers written down once. If they change, every result that was recorded with the small model changes."""
    weight = small_stable_diffusion(seed=0).unet.conv_in.weight.flatten()
    assert weight[:3].tolist() == [-0.0021612588316202164, 0.15485791862010956, -0.2375926673412323]


@torch.no_grad()
@pytest.mark.parametrize("v2", [False, True])
def test_predictions_depend_on_everything(small_models, v2):
    model = small_models[v2]
    context = encode_text(model.text_encoder, tokenize(model.tokenizer, ["a cat", "two dogs"]))
    noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    noise = predict_noise(model.unet, noisy, times, context)
    assert noise.shape == noisy.shape and 0.2 < noise.std() < 2
    assert (noise - predict_noise(model.unet, noisy, times, context.flip(0))).std() > 0.01
    assert (noise - predict_noise(model.unet, noisy, times.flip(0), context)).std() > 0.01
    assert (noise - predict_noise(model.unet, -noisy, times, context)).std() > 0.1


@torch.no_grad()
def test_latents_are_as_the_real_ones(small_models):
    vae = small_models[False].vae
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_image(vae, images, torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 8, 12)
    assert torch.equal(latents, encode_image(vae, images, torch.Generator().manual_seed(0)))
    assert 0.3 < (latents * vae.config.scaling_factor).std() < 3
    decoded = decode_latents(vae, latents * vae.config.scaling_factor)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    torch.testing.assert_close(decoded, vae.decode(latents).sample.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_ready_for_use(small_models):
    for model in small_models.values():
        for module in (model.unet, model.vae, model.text_encoder):
            assert not module.training
            assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
            assert not any(buffer.is_meta for buffer in module.buffers())


def test_fingerprint_sees_every_change():
    vae = small_stable_diffusion().vae
    before = vae_fingerprint(vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-6
    assert vae_fingerprint(vae) != before
    assert vae_fingerprint(vae.half()) != before
