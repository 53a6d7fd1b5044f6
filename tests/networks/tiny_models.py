"""Tiny models of the Stable Diffusion architecture, for the network tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn


@dataclass
class TinyModel:
    """A text encoder and a U-Net with one fixed input, in eval mode and frozen."""

    text_encoder: nn.Module
    unet: nn.Module

    def run(self) -> tuple[Tensor, Tensor]:
        """(text encoder output, U-Net output) for the fixed input."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 90, (2, 77), generator=generator)
        latents = torch.randn(
            2, 4, 16, 16, generator=generator
        )  # 2 x 2 positions in the middle block: with one, attention is constant
        context = self.text_encoder(ids).last_hidden_state
        return context, self.unet(latents, torch.tensor([3, 700]), context).sample

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for part in (self.text_encoder, self.unet) for p in part.parameters()]


def make_tiny_model(linear_projection: bool = False) -> TinyModel:
    """The same one each time, which the test may change."""
    return copy.deepcopy(_made_once(linear_projection))


@cache
def _made_once(linear_projection: bool) -> TinyModel:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            cross_attention_dim=24,
            attention_head_dim=4,
            sample_size=8,
            block_out_channels=(16, 16, 32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            use_linear_projection=linear_projection,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=100,
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    return TinyModel(text_encoder.eval().requires_grad_(False), unet.eval().requires_grad_(False))
