"""Weights in several files with an index beside them, as Diffusers and transformers save large models; read as one file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.formats.tensor_file import Fetch, TensorFile, open_tensors


class ShardedFile(TensorFile):
    """The tensors that an index (`....safetensors.index.json`) lists. Use it in a `with` block, which closes all files."""

    def __init__(self, index: Path):
        self.path, self.shapes, self.dtypes, self.metadata, self.counters = index, {}, {}, {}, {}
        self._stack, self._file_of = ExitStack(), {}
        try:
            for path, names in _shards(index):
                shard = self._stack.enter_context(open_tensors(path))
                for name in names:
                    if name not in shard.shapes:
                        raise UserError(f"{path} lacks the tensor {name}, which {index.name} lists; fetch the model again")
                    self.shapes[name], self.dtypes[name] = shard.shapes[name], shard.dtypes[name]
                    self._file_of[name] = shard
        except UserError:
            self.close()
            raise

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        return self._file_of[name].read(name, dtype, device)

    def view(self, name: str) -> Tensor:
        return self._file_of[name].view(name)

    def _tensor(self, name: str, fetch: Fetch) -> Tensor:
        return self._file_of[name]._tensor(name, fetch)

    def close(self) -> None:
        self._stack.close()


def _shards(index: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each file that the index names, and the tensors it lists for it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(Path(file).name, []).append(name)  # beside the index, and nowhere else
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is no index of weights ({error}); fetch the model again") from error
    if not by_file:
        raise UserError(f"{index} lists no weights; fetch the model again")
    for file, names in sorted(by_file.items()):
        yield index.with_name(file), names
