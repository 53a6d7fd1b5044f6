"""Text-encoder outputs, computed once for every caption."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from library.models.family import Conditioning


class TextCache:
    """Outputs of frozen text encoders for a finite set of captions, on the CPU."""

    def __init__(self, rows: dict[str, int], states: Conditioning) -> None:
        self.rows = rows
        self.states = states  # a row for each caption

    @classmethod
    def build(cls, captions: list[str], encode: Callable[[list[str]], Conditioning], batch_size: int) -> TextCache:
        """Encode each distinct caption once; `encode` gives a row for each, of one length for all."""
        distinct = list(dict.fromkeys(captions))
        if not distinct:
            raise ValueError("no captions to encode")
        states: dict[str, Tensor] = {}
        with tqdm(total=len(distinct), desc="caching captions", unit=" captions", delay=1.0) as bar:
            for start in range(0, len(distinct), batch_size):
                part = distinct[start : start + batch_size]
                for name, encoded in encode(part).tensors.items():
                    if name not in states:  # filled in place: a second copy could be gigabytes
                        states[name] = torch.empty((len(distinct), *encoded.shape[1:]), dtype=encoded.dtype)
                    states[name][start : start + len(part)] = encoded.detach().cpu()
                bar.update(len(part))
        return cls({caption: row for row, caption in enumerate(distinct)}, Conditioning(states))

    def lookup(self, captions: list[str]) -> Conditioning:
        """A row for each caption, in the dtype `encode` gave."""
        return self.states.rows([self.rows[caption] for caption in captions])
