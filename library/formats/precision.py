"""The dtypes of weights by the words that options have for them. Torch is imported for a dtype only: a parser needs the words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PRECISIONS = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}  # an option's word -> torch's


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of an option's word: `float`, `fp16` or `bf16`."""
    import torch

    return getattr(torch, PRECISIONS[precision])
