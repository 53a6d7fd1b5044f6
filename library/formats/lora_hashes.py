"""The hashes by which web UIs know a LoRA file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from library.formats.tensor_output import (
    Plan,
    RowsOf,
    bytes_of,
    parts_of,
    plan_of,
    rows_in,
    safetensors_header,
    safetensors_order,
)

LEGACY = slice(0x100000, 0x110000)  # bytes of the file


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the hashes of a file of these tensors as safetensors writes it, by name; see `hashes`."""
    plan = plan_of(dict(sorted(tensors.items())))
    return {**metadata, **hashes(plan, lambda name, rows: rows_in(tensors[name].detach().cpu(), rows), metadata)}


def hashes(plan: Plan, rows_of: RowsOf, metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hashes by which web UIs know a LoRA, of a .safetensors file as `write_weights` makes it.

    sshs_model_hash: SHA-256 of the tensor data alone. sshs_legacy_hash: 8 digits over LEGACY bytes of the file as it would be
    with the metadata keys `ss_...` only.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header = safetensors_header(plan, training)
    data, legacy, offset = hashlib.sha256(), hashlib.sha256(header[LEGACY]), len(header)
    for name in safetensors_order(plan):
        for rows in parts_of(plan[name][0]):
            space = bytes_of(rows_of(name, rows).contiguous())
            data.update(space)
            legacy.update(space[max(LEGACY.start - offset, 0) : max(LEGACY.stop - offset, 0)])
            offset += len(space)
    return {"sshs_model_hash": data.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}
