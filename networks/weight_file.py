"""Files of weights, one tensor at a time: `.safetensors`, `.ckpt`, `.pt`, `.pth` and `.bin`, read and written.

A model of several GB passes through in the memory of its largest tensor. Tensors are read into memory of their own, not mapped:
mapped pages count as the process's memory, and on Windows an open mapping keeps the file from being replaced. Pickled files are
untrusted: code in them never runs. What is written appears under its name only after it was read back.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import threading
import uuid
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from networks.low_rank import is_finite
from networks.parallel import in_parallel

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
REMAP_AFTER = 256 << 20  # bytes


class WeightFile(ABC):
    """The tensors of one open file. Use it in a `with` block, which closes the file. Several threads may read."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self.shapes: dict[str, tuple[int, ...]] = {}  # in the order in which reading is fastest
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        self.numbers: dict[str, Any] = {}  # what a pickled checkpoint says of itself: epoch, global_step

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor as it is in the file, in memory of its own."""

    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SafetensorsFile(WeightFile):
    """A .safetensors file, in the order of its bytes."""

    def __init__(self, path: Path):
        super().__init__(path)
        header, self._start = _read_header(path)
        self.metadata = header.pop("__metadata__", None) or {}
        self._begins = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, end) = _DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            if dtype is None:
                raise ValueError(f"{path}: the tensor {name} has the unknown dtype {entry['dtype']}; get an fp16 or fp32 file")
            if begin < 0 or any(size < 0 for size in shape) or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{path} is damaged: the size of the tensor {name} does not fit its shape; fetch it again")
            self.shapes[name], self.dtypes[name], self._begins[name] = shape, dtype, begin
        self._file = open(path, "rb", buffering=0)  # closed by close()

    def read(self, name: str) -> Tensor:
        value = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        space = _bytes(value)
        with self._lock:
            self._file.seek(self._start + self._begins[name])
            while space:
                count = self._file.readinto(space)
                if not count:
                    raise ValueError(f"{self.path} was cut off while it was read; fetch it again")
                space = space[count:]
        return value

    def close(self) -> None:
        self._file.close()


class PickledFile(WeightFile):
    """A pickled file, mapped into memory where its format allows; the map is made anew now and then, to free what was read."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._tensors: dict[str, Tensor] = {}
        content = self._open()
        self.shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}
        self.dtypes = {name: value.dtype for name, value in self._tensors.items()}
        self.numbers = {key: content[key] for key in ("epoch", "global_step") if isinstance(content.get(key), int)}

    def _open(self) -> dict[Any, Any]:
        self._tensors.clear()
        self._since_open = 0
        self._is_mapped = zipfile.is_zipfile(self.path)
        content = _unpickle(self.path, self._is_mapped)
        wrapped = content.get("state_dict")
        tensors = wrapped if isinstance(wrapped, dict) else content
        self._tensors = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
        if not self._tensors:
            raise ValueError(f"{self.path} holds no tensors; it is no model or LoRA")
        return content

    def read(self, name: str) -> Tensor:
        with self._lock:
            if self._is_mapped and self._since_open > REMAP_AFTER:
                self._open()
            value = self._tensors[name].detach().clone(memory_format=torch.contiguous_format)
            self._since_open += value.nbytes
        return value

    def close(self) -> None:
        self._tensors.clear()


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


def _unpickle(path: Path, is_mapped: bool) -> dict[Any, Any]:
    try:
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
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


def _bytes(value: Tensor) -> memoryview:
    return memoryview(value.view(-1).view(torch.uint8).numpy()) if value.numel() else memoryview(b"")


# ---------------------------------------------------------------- writing


def output_path(
    name: str | os.PathLike, inputs: Sequence[Path], suffixes: Sequence[str] = (".safetensors", ".ckpt", ".pt", ".pth")
) -> Path:
    """The path to write, checked: a known suffix, no folder, and none of the inputs."""
    path = Path(name)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"--save_to {name}: the suffix decides the format; use one of {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"--save_to {name} is a folder; give a file name")
    for other in inputs:
        if path.exists() and other.exists() and os.path.samefile(path, other):
            raise ValueError(f"--save_to {name} would overwrite an input; give another name")
    return path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its suffix; when the block ends well it is flushed to disk and renamed to `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; check the folder, its rights and free space"
        ) from error


def write_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    numbers: Mapping[str, Any] | None = None,
) -> None:
    """Write the named tensors to `path`, asking `tensor` for one at a time; only tensors of these shapes and dtypes come.

    `metadata` goes into a .safetensors file, `numbers` (epoch, global_step) into a pickled one. ValueError, naming the tensor,
    for a number that is not finite, or if what was written does not read back the same; then no file is made.
    """
    if path.suffix.lower() == ".safetensors":
        with atomic(path) as temporary:
            _stream(temporary, path, shapes, dtypes, tensor, metadata)
        return
    # torch.save wants all tensors at once: it gets them mapped from a file that was streamed.
    with atomic(path) as temporary:
        streamed = temporary.with_suffix(".safetensors")
        try:
            _stream(streamed, path, shapes, dtypes, tensor, {})
            with safetensors.safe_open(streamed, "pt") as source:
                tensors = {name: source.get_tensor(name) for name in shapes}
                torch.save({"state_dict": tensors, **(numbers or {})}, temporary)
                del tensors
            _unpickle(temporary, is_mapped=True)
        finally:
            streamed.unlink(missing_ok=True)


def _stream(
    file: Path,
    final: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a .safetensors file tensor by tensor, and read it back."""
    # Large dtypes first, as safetensors itself does: so every tensor is aligned.
    names = sorted(shapes, key=lambda name: -dtypes[name].itemsize)

    def prepared(name: str) -> tuple[Tensor, int]:
        value = tensor(name).contiguous()
        if tuple(value.shape) != tuple(shapes[name]) or value.dtype != dtypes[name]:
            raise ValueError(f"{name}: {value.dtype} {tuple(value.shape)} does not fit the plan; this is a bug")
        if not is_finite(value):
            raise ValueError(
                f"{final} was not written: {name} holds NaN or infinity in {str(value.dtype).removeprefix('torch.')}"
            )
        return value, checksum(value)

    sums = {}
    with open(file, "wb", buffering=0) as stream:
        stream.write(_header(names, shapes, dtypes, metadata))
        for name, (value, total) in zip(names, in_parallel(names, prepared)):
            sums[name] = total
            space = _bytes(value)
            while space:
                space = space[stream.write(space) :]
    with SafetensorsFile(file) as written:
        for name, found in zip(written.shapes, in_parallel(written.shapes, lambda name: checksum(written.read(name)))):
            if found != sums[name]:
                raise ValueError(f"{final} was not written: {name} did not read back as it was written; check the disk")


def _header(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def checksum(value: Tensor) -> int:
    """A sum over the tensor's bytes, eight at a time: as fast as memory, and enough to tell a file that was cut or mangled."""
    flat = value.view(-1).view(torch.uint8) if value.numel() else torch.zeros(0, dtype=torch.uint8)
    whole = len(flat) // 8 * 8
    aligned = flat[:whole].view(torch.int64) if flat.data_ptr() % 8 == 0 else flat[:whole].clone().view(torch.int64)
    return int(aligned.sum()) * 31 + int(flat[whole:].sum(dtype=torch.int64))
