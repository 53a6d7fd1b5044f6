"""One file of weights, of any format in use (`.safetensors`, `.ckpt`, `.pt`, `.pth`, `.bin`): names and shapes first, then
its tensors one at a time. What is in a file decides its format. Pickled files are untrusted: code in them never runs.

A tensor can be had in two ways. `read` gives it memory of its own: the file may be replaced afterwards, also on Windows. `view`
maps a stretch of the file: a model of several GB passes through in little memory, part by part, in several threads.
"""

from __future__ import annotations

import math
import mmap
import numbers
import os
import sys
import threading
import warnings
import weakref
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from library.errors import UserError, one_line
from library.files import read_safetensors_header
from library.formats.foreign import PLAIN_ARCHIVE, file_kind, instead_of_tensors

PICKLED_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
MODEL_SUFFIXES = (".safetensors", *PICKLED_SUFFIXES)

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WRAPPERS = ("state_dict", "model", "module")  # keys of a pickled file under which its tensors may be
NEWEST_PROTOCOL = 3  # of the pickles that torch reads with weights_only
MIN_FORGOTTEN = 32 << 20  # bytes that `Windows.forget` lets add up
WINDOW = 64 << 20  # bytes of a file that are mapped at a time; mapped pages count as the process's memory

Fetch = Callable[[int, int], Tensor]  # (first byte, number of bytes) -> flat uint8 tensor


class Windows:
    """The stretches of a file that are mapped and still in use. What was read of them counts as the process's memory."""

    def __init__(self) -> None:
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._used = 0

    def add(self, window: mmap.mmap) -> None:
        self._maps.add(window)

    def forget(self, used: int | None = None) -> None:
        """Give that memory back; views stay valid, and what is used again is read from the file again. On Linux alone: other
        systems take such pages back by themselves.

        used: bytes that were read since the last call; memory is given back only when they add up, since threads that still use
        it wait. None: now.
        """
        self._used += MIN_FORGOTTEN if used is None else used
        if sys.platform == "linux" and self._used >= MIN_FORGOTTEN:
            self._used = 0
            for window in list(self._maps):
                window.madvise(mmap.MADV_DONTNEED)


class TensorFile(ABC):
    """The tensors of one open file. Use it in a `with` block, which closes the file."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}  # by name, in the order of the file's bytes
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}  # of a .safetensors file
        self.counters: dict[str, Any] = {}  # what a pickled checkpoint says of itself: epoch, global_step
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._size = os.fstat(self._file.fileno()).st_size
        self.windows = Windows()
        self._window: mmap.mmap | None = None
        self._window_start = 0
        self._lock = threading.Lock()

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """One tensor on `device`; if it is of floating point, as `dtype`. Nothing keeps hold of the file."""
        value = self._tensor(name, self._read_bytes)
        if value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        return value.to(device=device, dtype=dtype if dtype and value.is_floating_point() else None)

    def view(self, name: str) -> Tensor:
        """One tensor as it is in the file. Its memory is mapped: who keeps it keeps WINDOW bytes of the file, also after close(),
        unless `windows` forgets them. What is changed in it does not reach the file. Several threads may view at once."""
        return self._tensor(name, self._map_bytes)

    @abstractmethod
    def _tensor(self, name: str, fetch: Fetch) -> Tensor:
        """One tensor, contiguous, made of bytes that `fetch` gets."""

    def _read_bytes(self, begin: int, count: int) -> Tensor:
        space = torch.empty(count, dtype=torch.uint8)
        left = space.numpy().data
        with self._lock:
            self._file.seek(begin)
            while left:
                found = self._file.readinto(left)
                if not found:
                    raise UserError(f"{self.path} was cut off while it was read; fetch it again")
                left = left[found:]
        return space

    def _map_bytes(self, begin: int, count: int) -> Tensor:
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        with self._lock:
            end = self._window_start + len(self._window) if self._window else 0
            if begin < self._window_start or begin + count > end:
                self._window_start = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
                length = min(max(WINDOW, begin + count - self._window_start), self._size - self._window_start)
                self._window = mmap.mmap(self._file.fileno(), length, access=mmap.ACCESS_COPY, offset=self._window_start)
                self.windows.add(self._window)
                if hasattr(mmap, "MADV_WILLNEED"):
                    self._window.madvise(mmap.MADV_WILLNEED)  # the disk reads on while the beginning is worked on
            return torch.frombuffer(self._window, dtype=torch.uint8, count=count, offset=begin - self._window_start)

    def close(self) -> None:
        """Let go of the file. Views that are still held keep their memory."""
        self._file.close()
        self._window = None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SafetensorsFile(TensorFile):
    """A .safetensors file."""

    def __init__(self, path: Path):
        header = read_safetensors_header(path)
        super().__init__(path)
        self.metadata = header.pop("__metadata__", None) or {}
        self._begins: dict[str, int] = {}
        start = self._size - max(
            (entry["data_offsets"][1] for entry in header.values()), default=0
        )  # of the data, which end the file
        try:
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                self._add(name, entry, start)
        except UserError:
            self.close()
            raise

    def _add(self, name: str, entry: Mapping[str, Any], start: int) -> None:
        dtype, shape, (begin, end) = DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if dtype is None:
            raise UserError(f"{self.path}: the tensor {name} has the unknown dtype {entry['dtype']}; get an fp16 or fp32 file")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{self.path} is damaged: the size of the tensor {name} does not fit its shape; fetch it again")
        self.shapes[name], self.dtypes[name], self._begins[name] = shape, dtype, start + begin

    def _tensor(self, name: str, fetch: Fetch) -> Tensor:
        shape, dtype = self.shapes[name], self.dtypes[name]
        return _typed(fetch(self._begins[name], math.prod(shape) * dtype.itemsize), dtype).view(shape)


class PickledFile(TensorFile):
    """A .ckpt, .pt or .bin file. In today's zip layout tensors lie uncompressed at known places; older files are read whole."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            content = load_pickled(path, map_location="meta" if _is_plain_zip(path) else "cpu")
            found = {
                str(name): tensor for name, value in _unwrapped(content).items() if (tensor := _tensor_of(value)) is not None
            }
            if not found:
                what = instead_of_tensors(map(str, content))
                raise UserError(f"{path} is {what}" if what else f"{path} holds no tensors; it is no model or LoRA")
            self._tensors = dict(sorted(found.items(), key=lambda item: _storage_start(item[1])))
            ends = (_storage_start(value) + value.untyped_storage().nbytes() for value in found.values() if value.is_meta)
            if max(ends, default=0) > self._size:
                raise UserError(f"{path} is damaged: tensors in it lie beyond its end; fetch it again")
        except UserError:
            self.close()
            raise
        self.shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}
        self.dtypes = {name: value.dtype for name, value in self._tensors.items()}
        self.counters = {
            key: int(content[key]) for key in ("epoch", "global_step") if isinstance(content.get(key), numbers.Integral)
        }

    def _tensor(self, name: str, fetch: Fetch) -> Tensor:
        value = self._tensors[name]
        if not value.is_meta:
            return value.clone(memory_format=torch.contiguous_format)
        size = value.untyped_storage().nbytes() // value.dtype.itemsize * value.dtype.itemsize
        whole = _typed(fetch(_storage_start(value), size), value.dtype)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset()).contiguous()

    def close(self) -> None:
        self._tensors = {}
        super().close()


def _unwrapped(content: dict[str, Any]) -> dict[str, Any]:
    """The dictionary of the tensors, which trainers put beside other things."""
    wrapped = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    return content if wrapped is None else _unwrapped(wrapped)


def _tensor_of(value: Any) -> Tensor | None:
    """A tensor, also of a numpy array of numbers; None of anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    is_numbers = isinstance(value, numpy.ndarray) and value.dtype.kind in "fiub"
    return torch.from_numpy(value.copy()) if is_numbers else None


def _typed(found: Tensor, dtype: torch.dtype) -> Tensor:
    """Flat bytes as numbers of a dtype; copied if they do not lie at a multiple of its size."""
    return (found if found.data_ptr() % dtype.itemsize == 0 else found.clone()).view(dtype)


def _is_plain_zip(path: Path) -> bool:
    """Whether the file is a zip archive without compression."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception:  # a damaged archive can raise anything
        return False


def _is_archive_of_files(path: Path) -> bool:
    """Whether it is a zip archive without the record that each of torch's has."""
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("data.pkl") for name in archive.namelist())
    except Exception:  # a damaged archive can raise anything
        return False


def _storage_start(value: Tensor) -> int:
    """Where in the file the storage of a tensor on the meta device begins, in bytes; 0 for one that is in memory."""
    return (value.untyped_storage()._checkpoint_offset or 0) if value.is_meta else 0


def open_tensors(path: Path) -> TensorFile:
    """Open a file of weights; what is in it decides the format.

    Raises UserError, naming file and reason, if it is missing, empty, cut off, no file of weights, or holds code.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; a file is needed ({', '.join(MODEL_SUFFIXES)})")
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not start:
        raise UserError(f"{path} is empty; fetch it again")
    # A .safetensors file begins with the length of its header (8 bytes, far below 4 GiB), then "{".
    if start[4:9] == b"\0\0\0\0{":
        return SafetensorsFile(path)
    if start[:2] == b"PK" and _is_archive_of_files(path):
        raise UserError(f"{path} is {PLAIN_ARCHIVE}")
    if start[:2] == b"PK" or start[0] == 0x80:  # a zip archive as torch writes it, or a plain pickle
        if path.suffix.lower() == ".safetensors":  # whoever chose a .safetensors file did not choose to unpickle one
            raise UserError(f"{path} is a pickled checkpoint under a wrong name; rename it to {path.stem}.ckpt if you trust it")
        return PickledFile(path)
    if what := file_kind(start):
        raise UserError(f"{path} is {what}")
    raise UserError(f"{path} is no file of weights, is cut off, or its beginning is damaged; fetch it again")


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, on the CPU. Raises UserError, naming file and reason, if it is damaged."""
    path = Path(path)
    try:
        read_safetensors_header(path)
        return safetensors.torch.load(path.read_bytes())  # `load_file` opens no path that is not UTF-8
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); fetch it again") from error


def load_pickled(path: str | os.PathLike, map_location: str = "cpu") -> dict[str, Any]:
    """The dictionary in a .ckpt/.pt/.bin file, never running code in it.

    map_location: "cpu", or "meta" for shapes and dtypes alone.
    Raises UserError, naming file and reason, for a file that is cut off, damaged, or holds more than data.
    """
    path = Path(path)
    if (protocol := _pickle_protocol(path)) > NEWEST_PROTOCOL:
        raise UserError(
            f"{path} was not opened: it is pickled with protocol {protocol}, which torch cannot read without running code in it; "
            "save it again where it was made, with torch.save and its usual protocol 2, or get a .safetensors file of it"
        )
    try:
        # Opened here, since torch would choose a format by the name.
        with open(path, "rb") as file, torch.serialization.safe_globals(_harmless_globals()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol 3")
            content = torch.load(file, map_location=map_location, weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        if _asks_for_code(str(error)):
            raise UserError(
                f"{path} was not opened: it holds more than tensors, and code in it would have run; "
                "get a .safetensors file of this model instead"
            ) from error
        # torch wraps what was wrong into advice on how to switch the protection off.
        words = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error) or type(error).__name__
        words = words.splitlines()[0].partition(". ")[0]
        raise UserError(f"{path} is cut off, damaged or no checkpoint ({words}); fetch it again") from error
    if isinstance(content, list) and content and all(isinstance(value, Tensor) for value in content):
        raise UserError(
            f"{path} is a list of tensors without names, as cloneofsimo's trainer wrote LoRAs; "
            "merge it into a model with that program, or get another file"
        )
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors; it is no model or LoRA")
    return content


def _pickle_protocol(path: Path) -> int:
    """The protocol of a pickle, alone or in a zip archive, by its first bytes; 0 if they do not show it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(pickled) as file:
                    start = file.read(2)
        else:
            with open(path, "rb") as file:
                start = file.read(2)
    except Exception:  # a damaged archive can raise anything
        return 0
    return start[1] if start[:1] == b"\x80" else 0


def _asks_for_code(message: str) -> bool:
    """Whether torch rejected a pickle for what it would call, rather than for being damaged."""
    return any(
        words in message
        for words in ("Unsupported global", "Unsupported class", "not an allowed global", "Trying to ", "Can only build")
    )


class _Inert:
    """Stands in for classes that training programs leave in checkpoints: takes everything, does nothing."""

    def __init__(self, *values: object):
        pass


def _harmless_globals() -> list[Any]:
    """Data that stand in checkpoints beside tensors: Lightning's record of the best model, numpy's numbers and arrays."""
    scalar, array = numpy.float64(0).__reduce__()[0], numpy.zeros(1).__reduce__()[0]
    modules = ("pytorch_lightning.callbacks.model_checkpoint", "lightning.pytorch.callbacks.model_checkpoint")
    return [
        *((_Inert, f"{module}.ModelCheckpoint") for module in modules),
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        (array, "numpy.core.multiarray._reconstruct"),
        (array, "numpy._core.multiarray._reconstruct"),
        numpy.ndarray,
        numpy.dtype,
        *(type(numpy.dtype(kind)) for kind in "?bhilqBHILQefdSU"),
    ]
