"""Embeddings of prompts, cached for the images that use the same text again."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.models.clip import CHUNK, count_chunks, tokenize_prompts
from library.models.family import Conditioning

if TYPE_CHECKING:
    from library.models.family import Model

log = logging.getLogger(__name__)


class PromptCache:
    """Embeddings of the texts that were used last, at most `capacity` of them.

    A text is encoded again when it needs another number of chunks or other strengths of networks.
    """

    def __init__(self, capacity: int = 1000) -> None:
        self.capacity = capacity
        self._cached: OrderedDict[Hashable, Conditioning] = OrderedDict()
        self._chunks: dict[str, int] = {}  # of every text so far

    @torch.no_grad()
    def encode(
        self, model: Model, texts: list[str], chunks: int, clip_skip: int | None = None, state: Hashable = ()
    ) -> Conditioning:
        """A row for each text. state: which networks act on the text encoder, and how strongly."""
        keys = {text: (text, chunks, clip_skip, state) for text in texts}
        new = [text for text, key in keys.items() if key not in self._cached]
        if new:
            self._cached.update(
                zip([keys[text] for text in new], encode_prompts(model, new, chunks, clip_skip).split(), strict=True)
            )
        encoded = Conditioning.cat([self._cached[keys[text]] for text in texts])
        for key in keys.values():
            self._cached.move_to_end(key)
        while len(self._cached) > self.capacity:
            self._cached.popitem(last=False)
        return encoded

    def chunks_needed(self, model: Model, texts: list[str], max_token_length: int) -> int:
        """How many chunks of 75 tokens are read of these texts. Logs each text that is cut, once."""
        limit = max(1, max_token_length // CHUNK)
        for text in [text for text in texts if text not in self._chunks]:
            self._chunks[text] = needed = count_chunks(model.tokenizers[0], text)
            if needed > limit:
                why = " (BREAK begins a new one)" if "BREAK" in text else ""
                log.warning(
                    f"prompt '{short(text)}' fills {needed} chunks of {CHUNK} tokens{why}, of which {limit} can be read: the "
                    f"rest is cut; gen_img_diffusers.py reads all with --max_embeddings_multiples={needed}"
                )
        return min(max(self._chunks[text] for text in texts), limit)


def encode_prompts(model: Model, texts: list[str], chunks: int, clip_skip: int | None = None) -> Conditioning:
    """A row for each prompt, with the weights in it."""
    return model.encode_text(tokenize_prompts(model.tokenizers, texts, chunks), clip_skip)


def short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
