"""library/generation/extras/vae_slices.py: less memory, the same image."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from library.generation.extras.vae_slices import slice_vae
from library.testing import small_stable_diffusion


def test_images_and_latents_are_the_same_and_fewer_rows_are_in_work(monkeypatch):
    vae = small_stable_diffusion(vae_channels=(32, 32, 32, 32)).vae
    latents, pixels = torch.randn(2, 4, 5, 8), torch.rand(1, 3, 40, 64)
    rows = []

    def convolve(values, weight, *rest, conv2d=F.conv2d):
        rows.append(values.shape[2])
        return conv2d(values, weight, *rest)

    def through_both_ways() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            encoded = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0))
            rows.clear()
            return vae.decode((latents) / vae.config.scaling_factor).sample.clamp(-1, 1), encoded

    plain = through_both_ways()
    monkeypatch.setattr(F, "conv2d", convolve)
    for slices, most in ((3, 14 + 2), (64, 5)):  # the decoder's first convolution, of 1 x 1, sees all 5 rows
        slice_vae(vae, slices)
        for one, other in zip(plain, through_both_ways(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert max(rows) == most
