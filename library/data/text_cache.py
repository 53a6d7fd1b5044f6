"""Text-encoder outputs, computed once for every caption."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm


class TextCache:
    """Outputs of a frozen text encoder for a finite set of captions, on the CPU."""

    def __init__(self, rows: dict[str, int], states: Tensor) -> None:
        self.rows = rows
        self.states = states  # (captions, length, width)

    @classmethod
    def build(cls, captions: list[str], encode: Callable[[list[str]], Tensor], batch_size: int) -> TextCache:
        """Encode each distinct caption once; `encode` gives (B, length, width), of one length for all."""
        distinct = list(dict.fromkeys(captions))
        states = None
        with tqdm(total=len(distinct), desc="caching captions", unit=" captions", delay=1.0) as bar:
            for start in range(0, len(distinct), batch_size):
                part = distinct[start : start + batch_size]
                encoded = encode(part).detach().cpu()
                if states is None:  # filled in place: a second copy could be gigabytes
                    states = torch.empty((len(distinct), *encoded.shape[1:]), dtype=encoded.dtype)
                states[start : start + len(part)] = encoded
                bar.update(len(part))
        if states is None:
            raise ValueError("no captions to encode")
        return cls({caption: row for row, caption in enumerate(distinct)}, states)

    def lookup(self, captions: list[str]) -> Tensor:
        """(B, length, width), in the dtype `encode` gave."""
        return self.states[[self.rows[caption] for caption in captions]]
