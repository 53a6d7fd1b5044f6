"""The suite's LoRA module: that of networks/lora.py with dropouts, as one function with its layer, and with a norm to limit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.fused import fused_output
from networks.lora import Layer, LoRAModule, weight_delta


class SuiteModule(LoRAModule):
    """A LoRA module with three dropouts, which act in training mode only.

    dropout: of single values between `down` and `up`; rank_dropout: of whole ranks of a sample; both scale what is left by
    1 / (1 - p). module_dropout: of this module in a whole call, without scaling.
    """

    def __init__(self, *args: Any, dropout: float = 0.0, rank_dropout: float = 0.0, module_dropout: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout

    def forward(self, x: Tensor) -> Tensor:
        """multiplier * scale * up(dropouts(down(x))): (B, ..., in) -> (B, ..., out), or (B, in, H, W) -> (B, out, H', W')."""
        hidden = self.lora_down(self.in_own_type(x))
        factor = self.scale * self.multiplier
        if self.training and self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.training and self.rank_dropout:
            hidden = hidden * self._rank_mask(hidden)
            factor = factor / (1 - self.rank_dropout)
        return self.lora_up(hidden * factor)

    def factors(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """(down, up, factor): without dropout, `forward` gives up(factor * down(x)). There may be a factor for each rank."""
        return self.lora_down.weight, self.lora_up.weight, self.scale * self.multiplier

    def _rank_mask(self, hidden: Tensor) -> Tensor:
        """0 or 1 for each sample and rank, the same at every token or position."""
        keep = torch.rand(len(hidden), self.rank, device=hidden.device) > self.rank_dropout
        positions = [1] * (hidden.dim() - 2)
        shape = (self.rank, *positions) if isinstance(self.lora_down, nn.Conv2d) else (*positions, self.rank)
        return keep.view(len(hidden), *shape)

    def is_idle(self) -> bool:
        """Whether this call adds nothing: switched off, strength 0 outside of training, or dropped as a whole."""
        if super().is_idle():
            return True
        # Drawn on the CPU: its generator is saved and restored by gradient checkpointing, and nothing waits for a GPU.
        return self.training and self.module_dropout > 0 and torch.rand(()).item() < self.module_dropout

    def added_to(self, output: Tensor, layer: Layer, x: Tensor) -> Tensor:
        fused = fused_output(self, layer, x, output)
        return super().added_to(output, layer, x) if fused is None else fused

    def product_norm(self) -> Tensor:
        """||scale * up down||, the Frobenius norm."""
        return weight_delta(self.lora_up.weight, self.lora_down.weight, self.scale * self.rank).norm()
