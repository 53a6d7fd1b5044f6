"""Files of weights, one tensor at a time: `.safetensors`, `.ckpt`, `.pt`, `.pth` and `.bin`, read.

A model of several GB passes through in little memory: a stretch of the file is mapped at a time (mapped pages count as the
process's memory). Pickled files are untrusted: code in them never runs.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WINDOW = 64 << 20  # bytes of a file that are mapped at a time


class WeightFile:
    """The tensors of one open file. Use it in a `with` block, which closes the file. Several threads may view."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}  # in the order of the file's bytes
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        self.numbers: dict[str, Any] = {}  # what a pickled checkpoint says of itself: epoch, global_step
        self._file = open(path, "rb")  # noqa: SIM115  (closed by close())
        self._size = os.fstat(self._file.fileno()).st_size
        self._window: mmap.mmap | None = None
        self._begin = 0
        self._lock = threading.Lock()

    def view(self, name: str) -> Tensor:
        """One tensor as it is in the file. Its memory is mapped: who keeps it keeps WINDOW bytes of the file, also after close().
        What is changed in it does not reach the file."""
        raise NotImplementedError

    def _bytes_at(self, begin: int, count: int) -> Tensor:
        """`count` bytes of the file from `begin` on. One stretch of the file is mapped at a time; views keep theirs."""
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        with self._lock:
            if self._window is None or begin < self._begin or begin + count > self._begin + len(self._window):
                self._begin = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
                length = min(max(WINDOW, begin + count - self._begin), self._size - self._begin)
                self._window = mmap.mmap(self._file.fileno(), length, access=mmap.ACCESS_COPY, offset=self._begin)
                if hasattr(mmap, "MADV_WILLNEED"):
                    self._window.madvise(mmap.MADV_WILLNEED)  # the disk reads on while the beginning is worked on
            return torch.frombuffer(self._window, dtype=torch.uint8, count=count, offset=begin - self._begin)

    def close(self) -> None:
        """Let go of the file. Views that are still held keep their memory."""
        self._file.close()
        self._window = None

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SafetensorsFile(WeightFile):
    """A .safetensors file."""

    def __init__(self, path: Path):
        header, self._start = _read_header(path)
        super().__init__(path)
        self.metadata = header.pop("__metadata__", None) or {}
        self._begins = {}
        try:
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                self._add(name, DTYPES.get(entry["dtype"]), entry)
        except ValueError:
            self.close()
            raise

    def _add(self, name: str, dtype: torch.dtype | None, entry: Mapping[str, Any]) -> None:
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"{self.path}: the tensor {name} has the unknown dtype {entry['dtype']}; get an fp16 or fp32 file")
        if begin < 0 or any(size < 0 for size in shape) or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{self.path} is damaged: the size of the tensor {name} does not fit its shape; fetch it again")
        self.shapes[name], self.dtypes[name], self._begins[name] = shape, dtype, self._start + begin

    def view(self, name: str) -> Tensor:
        shape, dtype = self.shapes[name], self.dtypes[name]
        found = self._bytes_at(self._begins[name], math.prod(shape) * dtype.itemsize)
        return typed(found, dtype).view(shape)


class PickledFile(WeightFile):
    """A pickled file. In today's zip layout tensors lie uncompressed at known places; older files are read whole."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            content = _unpickle(path, "meta" if _is_plain_zip(path) else "cpu")
            wrapped = content.get("state_dict")
            tensors = wrapped if isinstance(wrapped, dict) else content
            tensors = {str(name): value.detach() for name, value in tensors.items() if isinstance(value, Tensor)}
            if not tensors:
                raise ValueError(f"{path} holds no tensors; it is no model or LoRA")
            self._tensors = dict(sorted(tensors.items(), key=lambda item: _place(item[1])))
            if any(_place(value) + value.untyped_storage().nbytes() > self._size for value in self._tensors.values()):
                raise ValueError(f"{path} is damaged: tensors in it lie beyond its end; fetch it again")
        except ValueError:
            self.close()
            raise
        self.shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}
        self.dtypes = {name: value.dtype for name, value in self._tensors.items()}
        self.numbers = {key: content[key] for key in ("epoch", "global_step") if isinstance(content.get(key), int)}

    def view(self, name: str) -> Tensor:
        value = self._tensors[name]
        if not value.is_meta:
            return value.clone(memory_format=torch.contiguous_format)
        storage = value.untyped_storage().nbytes() // value.dtype.itemsize * value.dtype.itemsize
        whole = typed(self._bytes_at(_place(value), storage), value.dtype)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset()).contiguous()


def typed(found: Tensor, dtype: torch.dtype) -> Tensor:
    """Flat bytes as numbers of a dtype; copied if they do not lie at a multiple of its size."""
    return (found if found.data_ptr() % dtype.itemsize == 0 else found.clone()).view(dtype)


def _is_plain_zip(path: Path) -> bool:
    """Whether the file is a zip archive without compression."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except zipfile.BadZipFile:
        return False


def _place(value: Tensor) -> int:
    """Where in the file the storage of a tensor begins, which was loaded to the meta device; 0 for one that is in memory."""
    return value.untyped_storage()._checkpoint_offset if value.is_meta else 0


def open_weights(path: Path) -> WeightFile:
    """Open a file of weights; what is in it decides the format.

    ValueError, naming file and reason, if it is missing, empty, cut off, no file of weights, or holds code.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a file is needed ({', '.join(SUFFIXES)})")
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    if not start:
        raise ValueError(f"{path} is empty; fetch it again")
    is_pickled = start[:2] == b"PK" or start[0] == 0x80 and start[8:9] != b"{"  # a zip archive of torch's, or a plain pickle
    if is_pickled and path.suffix.lower() == ".safetensors":  # who chose a .safetensors file did not choose to unpickle one
        raise ValueError(f"{path} is a pickled file under a wrong name; rename it to {path.stem}.ckpt if you trust it")
    return PickledFile(path) if is_pickled else SafetensorsFile(path)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file, checked against the file's length, and where its data begin."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is cut off or no file of weights: it has no .safetensors header; fetch it again")
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            complete = all({"dtype", "shape"} <= entry.keys() for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or no file of weights: its header is not readable; fetch it again") from error
    if not complete or 8 + length + end != size:
        raise ValueError(f"{path} is cut off or damaged: {8 + length + end:,} bytes expected, {size:,} found; fetch it again")
    return header, 8 + length


def _unpickle(path: Path, device: str) -> dict[Any, Any]:
    try:
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(path, map_location=device, weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        AttributeError,
        ImportError,
        KeyError,
        TypeError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise ValueError(
                f"{path} was not opened: it holds more than tensors, and code in it would have run; "
                "get a .safetensors file instead"
            ) from error
        raise ValueError(f"{path} is cut off or no file of weights ({reason}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name; it is no model or LoRA")
    return content


class _Nothing:
    """In place of a class that Lightning leaves in checkpoints; it takes everything and does nothing."""

    def __init__(self, *values: object):
        pass


def _harmless() -> list[Any]:
    """What the original SD checkpoints hold beside tensors: the record of the best model, with numpy numbers in it."""
    import numpy

    scalar = numpy.float64(0).__reduce__()[0]
    lightning = [
        f"{package}.callbacks.model_checkpoint.ModelCheckpoint" for package in ("pytorch_lightning", "lightning.pytorch")
    ]
    numbers = [numpy.dtype, *(type(numpy.dtype(kind)) for kind in ("float64", "float32", "int64"))]
    return [
        *((_Nothing, name) for name in lightning),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *numbers,
    ]
