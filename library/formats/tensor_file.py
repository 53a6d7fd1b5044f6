"""One file of weights, of any of the formats in use: its names and shapes first, then its tensors one at a time.

A tensor is read into memory of its own. Mapping the file instead would not be faster (a mapped page is read at its first use),
would count twice where the dtype changes, and would keep the file open: Windows could not replace it while the model is in use.
"""

from __future__ import annotations

import io
import math
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.files import load_pickled_tensors, read_safetensors_header

PICKLED_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
MODEL_SUFFIXES = (".safetensors", *PICKLED_SUFFIXES)

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# What a foreign file's first bytes give away.
_FOREIGN = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"<", "a web page; the download gave an error or login page instead of the model"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself; run `git lfs pull`"),
    (b"%PDF", "a PDF document"),
    (b"GGUF", "a GGUF file, a format of other programs"),
)


class TensorFile(ABC):
    """The tensors of one open file. Use it in a `with` block, which closes the file."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}  # by name, in the order in which reading is fastest
        self.numbers: dict[str, Any] = {}  # what else a pickled checkpoint says of itself: epoch, global_step

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """One tensor as it is in the file, in memory of its own."""

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """One tensor on `device`; if it is of floating point, as `dtype`. Nothing keeps hold of the file."""
        value = self._read(name)
        return value.to(device=device, dtype=dtype if dtype and value.is_floating_point() else None)

    def close(self) -> None:  # noqa: B027  (not every file stays open)
        """Let go of the file."""

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SafetensorsFile(TensorFile):
    """A .safetensors file, read in the order of its bytes."""

    def __init__(self, path: Path):
        super().__init__(path)
        header = read_safetensors_header(path)
        header.pop("__metadata__", None)
        self._entries = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
        for name, entry in self._entries.items():
            self.shapes[name] = self._checked_shape(name, entry)
        with open(path, "rb") as file:
            self._start = 8 + int.from_bytes(file.read(8), "little")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by close())

    def _checked_shape(self, name: str, entry: dict[str, Any]) -> tuple[int, ...]:
        dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise UserError(f"{self.path}: the tensor {name} has the unknown dtype {entry['dtype']}; get an fp16 or fp32 file")
        begin, end = entry["data_offsets"]
        if begin < 0 or any(size < 0 for size in shape) or end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{self.path} is damaged: the size of the tensor {name} does not fit its shape; fetch it again")
        return shape

    def _read(self, name: str) -> Tensor:
        entry = self._entries[name]
        value = torch.empty(self.shapes[name], dtype=_DTYPES[entry["dtype"]])
        if value.numel():
            read_into(self._file, self._start + entry["data_offsets"][0], value.view(-1).view(torch.uint8), self.path)
        return value

    def close(self) -> None:
        self._file.close()


class PickledFile(TensorFile):
    """A .ckpt, .pt or .bin file. Code in it never runs."""

    def __init__(self, path: Path):
        super().__init__(path)
        # In today's zip layout tensors lie uncompressed at known places; older files have to be read whole.
        self._file = open(path, "rb", buffering=0) if _is_plain_zip(path) else None  # noqa: SIM115  (closed by close())
        try:
            with torch.serialization.safe_globals(_harmless_globals()):
                content = load_pickled_tensors(path, map_location="meta" if self._file else "cpu")
        except UserError:
            self.close()
            raise
        wrapped = content.get("state_dict")
        self._tensors = {str(name): value for name, value in (wrapped if isinstance(wrapped, dict) else content).items()}
        self._tensors = {name: value for name, value in self._tensors.items() if isinstance(value, Tensor)}
        self.shapes = {
            name: tuple(value.shape) for name, value in sorted(self._tensors.items(), key=lambda item: _place(item[1]))
        }
        self.numbers = {key: content[key] for key in ("epoch", "global_step") if isinstance(content.get(key), int)}

    def _read(self, name: str) -> Tensor:
        value = self._tensors[name].detach()
        if not value.is_meta:
            return value.clone()
        storage = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8)
        read_into(self._file, _place(value), storage, self.path)
        whole = storage.view(value.dtype)
        if value.is_contiguous() and value.numel() == whole.numel():
            return whole.view(value.shape)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset()).clone()

    def close(self) -> None:
        self._tensors = {}
        if self._file:
            self._file.close()


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
    """Where in the file the numbers of a tensor on the meta device begin, in bytes; 0 for one that is in memory."""
    return value.untyped_storage()._checkpoint_offset if value.is_meta else 0


def read_into(file: io.RawIOBase, start: int, space: Tensor, path: Path) -> None:
    """Fill a flat uint8 tensor with the bytes of an open file from `start` on."""
    left = memoryview(space.numpy())
    file.seek(start)
    while left:
        count = file.readinto(left)
        if not count:
            raise UserError(f"{path} was cut off while it was read; fetch it again")
        left = left[count:]


class _Inert:
    """Stands in for classes that training programs leave in checkpoints: takes everything, does nothing."""

    def __init__(self, *values: object):
        pass


def _harmless_globals() -> list[Any]:
    """Names in the original SD checkpoints beside tensors: Lightning's record of the best model, and numpy numbers in it."""
    import numpy

    scalar = numpy.float64(0).__reduce__()[0]
    modules = ("pytorch_lightning.callbacks.model_checkpoint", "lightning.pytorch.callbacks.model_checkpoint")
    return [
        *((_Inert, f"{module}.ModelCheckpoint") for module in modules),
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        numpy.dtype,
        *(type(numpy.dtype(kind)) for kind in ("float64", "float32", "int64")),
    ]


def open_tensors(path: Path) -> TensorFile:
    """Open a file of weights; what is in it decides the format.

    Raises UserError, naming file and reason, if it is missing, empty, cut off, no file of weights, or holds code.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not start:
        raise UserError(f"{path} is empty; fetch it again")
    # A .safetensors file begins with the length of its header (8 bytes, far below 4 GiB), then "{".
    if start[4:9] == b"\0\0\0\0{":
        return SafetensorsFile(path)
    if start[:2] == b"PK" or start[0] == 0x80:  # a zip archive as torch writes it, or a plain pickle
        if path.suffix.lower() == ".safetensors":  # whoever chose a .safetensors file did not choose to unpickle one
            raise UserError(f"{path} is a pickled checkpoint under a wrong name; rename it to {path.stem}.ckpt if you trust it")
        return PickledFile(path)
    for magic, what in _FOREIGN:
        if start.lstrip().startswith(magic):
            raise UserError(f"{path} is {what}")
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        raise UserError(f"{path} is a WebP picture")
    raise UserError(f"{path} is no file of weights, or its beginning is damaged; fetch it again")
