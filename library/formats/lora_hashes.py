"""The hashes by which web UIs know a LoRA file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata and the two hashes by which web UIs know a LoRA.

    sshs_model_hash: SHA-256 of the tensor data alone. sshs_legacy_hash: 8 digits over bytes 0x100000 to 0x110000 of the file
    as it would be with the metadata keys `ss_...` only.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = memoryview(safetensors.torch.save(dict(tensors), training))
    data_start = 8 + int.from_bytes(content[:8], "little")
    return {
        **metadata,
        "sshs_model_hash": hashlib.sha256(content[data_start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
