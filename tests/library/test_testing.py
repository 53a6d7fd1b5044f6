from __future__ import annotations

import pytest
import torch

from library.models.clip import empty_text_encoder, encode_text, tokenize
from library.models.modules import weights_fingerprint
from library.models.unet import empty_unet
from library.testing import full_size_configs, small_stable_diffusion


def module_names(module):
    return {name for name, _ in module.named_modules()}


@pytest.mark.parametrize("v2, family", [(False, "sd1"), (True, "sd2")])
def test_blocks_are_those_of_the_real_model(small_models, v2, family):
    configs = full_size_configs(family)
    small, full = module_names(small_models[v2].denoiser), module_names(empty_unet(configs["unet"]))
    assert small == full
    text = empty_text_encoder(configs["text_encoder"])
    assert module_names(small_models[v2].text_encoders[0]) < module_names(text)
    assert small_models[v2].text_encoders[0].config.vocab_size == 49408


def test_same_seed_same_weights_other_seed_other_weights(small_models):
    again, other = small_stable_diffusion(seed=1), small_stable_diffusion(seed=2)
    assert weights_fingerprint(again.vae) == weights_fingerprint(small_models[False].vae) != weights_fingerprint(other.vae)
    first = again.denoiser.state_dict()
    assert all(torch.equal(first[name], value) for name, value in small_models[False].denoiser.state_dict().items())


def test_weights_are_the_same_on_every_machine():
    """Numbers written down once. If they change, every result that was recorded with the small model changes."""
    weight = small_stable_diffusion(seed=0).denoiser.conv_in.weight.flatten()
    assert weight[:3].tolist() == [-0.0021612588316202164, 0.15485791862010956, -0.2375926673412323]


@torch.no_grad()
@pytest.mark.parametrize("v2", [False, True])
def test_predictions_depend_on_everything(small_models, v2):
    model = small_models[v2]
    context = encode_text(model.text_encoders[0], tokenize(model.tokenizers, ["a cat", "two dogs"])["ids"])
    noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    noise = model.denoiser(noisy, times, encoder_hidden_states=context).sample
    assert noise.shape == noisy.shape and 0.2 < noise.std() < 2
    assert (noise - model.denoiser(noisy, times, encoder_hidden_states=context.flip(0)).sample).std() > 0.01
    assert (noise - model.denoiser(noisy, times.flip(0), encoder_hidden_states=context).sample).std() > 0.01
    assert (noise - model.denoiser(-noisy, times, encoder_hidden_states=context).sample).std() > 0.1


@torch.no_grad()
def test_latents_are_as_the_real_ones(small_models):
    vae = small_models[False].vae
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 8, 12)
    assert torch.equal(latents, vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0)))
    assert 0.3 < (latents * vae.config.scaling_factor).std() < 3
    decoded = vae.decode((latents * vae.config.scaling_factor) / vae.config.scaling_factor).sample.clamp(-1, 1)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    torch.testing.assert_close(decoded, vae.decode(latents).sample.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_ready_for_use(small_models):
    for model in small_models.values():
        for module in (model.denoiser, model.vae, model.text_encoders[0]):
            assert not module.training
            assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
            assert not any(buffer.is_meta for buffer in module.buffers())


def test_fingerprint_sees_every_change():
    vae = small_stable_diffusion().vae
    before = weights_fingerprint(vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-6
    assert weights_fingerprint(vae) != before
    assert weights_fingerprint(vae.half()) != before
