"""The modules of a LoRA file that is being made, of a large one on the disk: it would need several times the file in memory."""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from library.formats.low_rank import LowRank
from library.formats.tensor_output import bytes_of

Place = tuple[int, tuple[int, ...]]  # first byte in the file, shape
# Bytes of the first modules, which stay in memory: to write and read them takes a tenth of a tool's time.
IN_MEMORY = 128 << 20


class SpooledModules(MutableMapping[str, LowRank]):
    """Modules by name, in the dtype that they will be saved in: the first in memory, the others in a temporary file, from which
    each is read when it is asked for.

    folder: where the temporary file lies, which has no name there. Use it in a `with` block, which deletes it.
    in_memory: bytes that may stay in memory.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, in_memory: int = IN_MEMORY):
        self._dtype = dtype
        self._free = in_memory
        self._modules: dict[str, LowRank | None] = {}  # None: in the file
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".spooled-")  # noqa: SIM115 - closed by __exit__
        self._places: dict[str, tuple[Place, Place, float]] = {}  # up, down, alpha
        self._lock = threading.Lock()

    def __setitem__(self, name: str, module: LowRank) -> None:
        module = module.to(self._dtype)
        size = module.up.nbytes + module.down.nbytes
        with self._lock:
            if size <= self._free:
                self._free -= size
                self._modules[name] = module
            else:
                self._modules[name] = None
                self._places[name] = self._write(module.up), self._write(module.down), module.alpha

    def __getitem__(self, name: str) -> LowRank:
        module = self._modules[name]
        if module is not None:
            return module
        up, down, alpha = self._places[name]
        with self._lock:
            return LowRank(self._read(up), self._read(down), alpha)

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __enter__(self) -> SpooledModules:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _write(self, tensor: Tensor) -> Place:
        begin = self._file.seek(0, 2)
        self._file.write(bytes_of(tensor.contiguous()))
        return begin, tuple(tensor.shape)

    def _read(self, place: Place) -> Tensor:
        begin, shape = place
        tensor = torch.empty(shape, dtype=self._dtype)
        self._file.seek(begin)
        if tensor.numel() and self._file.readinto(bytes_of(tensor)) != math.prod(shape) * self._dtype.itemsize:
            raise OSError(f"the temporary file in {self._file.name} was cut off")
        return tensor
