"""library/generation/extras/deep_shrink.py: large forms at a smaller size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.errors import UserError
from library.generation.extras.deep_shrink import shrinking
from library.generation.pipeline.pipeline import Pipeline
from library.generation.prompts.spec import DeepShrink, PromptSpec
from library.testing import small_stable_diffusion

CAT = PromptSpec("a cat", "", width=128, height=64, seed=7, scale=5.0, steps=3)
DEEP = DeepShrink(1, timestep_1=650)


@pytest.fixture(scope="module")
def deep_model():
    """Four depths, as the real ones have."""
    return small_stable_diffusion(seed=0, vae_channels=(32, 32, 32, 32))


def sizes_of_features(model, spec, latents_size=(8, 16), timestep=700):
    """(height, width) at the end of every block, on the way down and up."""
    sizes, handles = [], []
    for block in (*model.denoiser.down_blocks, *model.denoiser.up_blocks):

        def note(_, inputs, output):
            features = output[0] if isinstance(output, tuple) else output
            sizes.append(tuple(features.shape[-2:]))

        handles.append(block.register_forward_hook(note))
    latents = torch.randn(1, 4, *latents_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), shrinking(model.denoiser, spec):
        result = model.denoiser(latents, torch.tensor(timestep), encoder_hidden_states=torch.zeros(1, 77, 64)).sample
    for handle in handles:
        handle.remove()
    assert result.shape == latents.shape
    return sizes, result


def test_features_shrink_at_their_depth_and_grow_again(deep_model):
    usual, result = sizes_of_features(deep_model, None)
    assert usual == [(4, 8), (2, 4), (1, 2), (1, 2), (2, 4), (4, 8), (8, 16), (8, 16)]
    at_1, other = sizes_of_features(deep_model, DEEP)  # 4 x 8 becomes 2 x 4 there
    assert at_1[:4] == [(4, 8), (1, 2), (1, 1), (1, 1)] and at_1[-1] == (8, 16)
    assert (result - other).abs().max() > 1e-3
    at_0, _ = sizes_of_features(deep_model, DeepShrink(0, ratio=0.6))
    assert at_0[0] == (2, 5)  # 8 x 16 -> 4 x 9, then halved


@pytest.mark.parametrize("size", [(8, 16), (9, 15)])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_every_depth_and_size_works(deep_model, depth, size):
    sizes_of_features(deep_model, DeepShrink(depth), size)


def test_the_timestep_chooses_the_depth(deep_model):
    setting = DeepShrink(1, timestep_1=650, depth_2=2, timestep_2=300)
    by_timestep = {timestep: sizes_of_features(deep_model, setting, timestep=timestep)[0][:3] for timestep in (650, 649, 299)}
    assert by_timestep[650] == [(4, 8), (1, 2), (1, 1)]
    assert by_timestep[649] == [(4, 8), (2, 4), (1, 1)]
    assert by_timestep[299] == [(4, 8), (2, 4), (1, 2)]


def test_a_ratio_of_one_changes_nothing(deep_model):
    assert torch.equal(sizes_of_features(deep_model, None)[1], sizes_of_features(deep_model, DeepShrink(0, ratio=1.0))[1])


def test_trap_6_12_it_holds_for_its_own_prompt_alone(model, latents_of):
    usual = latents_of(model, [CAT])[0]
    first, shrunk, last = latents_of(model, [CAT, replace(CAT, deep_shrink=DEEP), CAT], batch_size=3)
    assert torch.equal(first, usual) and torch.equal(last, usual)
    assert (shrunk - usual).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("setting", "message"),
    [(DeepShrink(2), "ds_depth_1 2.*0 to 1"), (DeepShrink(0, depth_2=7), "ds_depth_2 7"), (DeepShrink(0, ratio=0), "ratio 0")],
)
def test_what_the_unet_lacks_is_named(model, setting, message):
    with pytest.raises(UserError, match=message):
        list(Pipeline(model).generate([replace(CAT, deep_shrink=setting)]))
