"""Text-encoder outputs, computed once for every caption."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class TextCache:
    """Outputs of a frozen text encoder for a finite set of captions, on the CPU."""

    def __init__(self, rows: dict[str, int], states: Tensor) -> None:
        self.rows = rows
        self.states = states  # (captions, length, width)

    @classmethod
    def build(cls, captions: list[str], encode: Callable[[list[str]], Tensor], batch_size: int) -> TextCache:
        """Encode each distinct caption once; `encode` gives (B, length, width), of one length for all."""
        raise NotImplementedError

    def lookup(self, captions: list[str]) -> Tensor:
        """(B, length, width), in the dtype `encode` gave."""
        raise NotImplementedError
