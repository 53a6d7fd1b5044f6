"""Captions to token ids, and a warning about captions that are too long."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from library.errors import counted
from library.models.clip import CHUNK, count_tokens, tokenize, whole_words_within
from library.safe_text import bytes_of

log = logging.getLogger(__name__)


class CaptionTokenizer:
    """Captions -> tokens; see `library.models.clip.tokenize`. `tokenizers`: one for each text encoder."""

    def __init__(self, tokenizers: Sequence[Any], max_token_length: int | None = None, weighted: bool = False) -> None:
        self.tokenizers, self.max_token_length, self.weighted = tokenizers, max_token_length, weighted
        # Else the tokenizers library warns about every loader process that is forked after its first use.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        return tokenize(self.tokenizers, captions, self.max_token_length, self.weighted)

    @property
    def tokenizer(self) -> Any:
        """The first one, which counts and shows tokens; all have the same vocabulary."""
        return self.tokenizers[0]

    @property
    def limit(self) -> int:
        """Tokens of a caption that are read."""
        return self.max_token_length or CHUNK

    def count(self, caption: str) -> int:
        """Tokens of a caption, also of what is cut off."""
        return count_tokens(self.tokenizer, caption, self.weighted)

    def read_part(self, caption: str) -> str:
        """The beginning of a caption that is read; the rest is cut off."""
        return whole_words_within(self.tokenizer, caption, self.limit, self.weighted)

    def readable(self, input_ids: Tensor) -> list[str]:
        """The tokens, as text, of one caption's ids (chunks, 77) for the first encoder, without begin, end and padding."""
        special = {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        ids = [token for token in input_ids.flatten().tolist() if token not in special]
        return [token.replace("</w>", "") for token in self.tokenizer.convert_ids_to_tokens(ids)]

    def warn_of_long(self, captions: Sequence[str]) -> int:
        """Warn if captions are truncated, with their number and an example; returns the number."""
        limit = self.limit
        # A token is at least one byte, so a short text need not be tokenized.
        candidates = [text for text in dict.fromkeys(captions) if len(bytes_of(text)) > limit]
        long = [text for text in candidates if self.count(text) > limit]
        if long:
            tokens = self.count(long[0])
            longer = {CHUNK: "give --max_token_length=150 or 225", 2 * CHUNK: "give --max_token_length=225"}
            cure = longer.get(limit, "the rest is not read")
            log.warning(
                "cut at %d tokens: %s, such as '%s...' with %d tokens; %s",
                limit,
                counted(len(long), "caption"),
                long[0][:60],
                tokens,
                cure,
            )
        return len(long)
