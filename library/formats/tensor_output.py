"""Files of weights written one tensor at a time: `.safetensors`, `.ckpt`, `.pt` and `.pth`.

What is written appears under its name only after it was flushed to the disk and read back.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from library.errors import UserError
from library.files import atomic_write
from library.formats.low_rank import is_finite
from library.formats.tensor_file import DTYPES, open_tensors
from library.parallel import on_matrices

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STORAGES = {
    torch.float64: "Double", torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16",
    torch.int64: "Long", torch.int32: "Int", torch.int16: "Short", torch.int8: "Char", torch.uint8: "Byte", torch.bool: "Bool",
}  # fmt: skip
FLUSH_AFTER = 64 << 20  # bytes
BUFFER = 1 << 18  # bytes; each write to the system lets other threads take over, so small tensors are gathered
ALIGNMENT = 64  # bytes, of tensors in pickled files, as torch has it

PART = 1 << 20  # numbers that are worked on at a time

Plan = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by name
Part = tuple[str, slice]  # some rows of a tensor
RowsOf = Callable[[str, slice], Tensor]  # some rows of a tensor; a number is asked for by no rows
Contents = Iterator[tuple[str, memoryview]]  # tensors part by part, in order


def write_weights(
    path: Path,
    plan: Plan,
    rows_of: RowsOf,
    metadata: Mapping[str, str],
    counters: Mapping[str, Any] | None = None,
) -> None:
    """Write the tensors of the plan to `path`, asking `rows_of` for some rows of one at a time.

    Parts of a few MB stay in the processor's cache, and their memory is used again and again. `metadata` goes into a
    .safetensors file, `counters` (epoch, global_step) into a pickled one, beside `state_dict`; without `counters` that is the
    dictionary of the tensors alone, as LoRA files are. UserError, naming the tensor, for a number that is not
    finite, or if what was written does not read back the same; then no file is made.
    """
    is_safetensors = path.suffix.lower() == ".safetensors"
    names = safetensors_order(plan) if is_safetensors else list(plan)
    sums: dict[tuple[str, int], int] = {}

    def prepared(batch: Sequence[Part]) -> list[tuple[Tensor, int]]:
        return [prepared_part(*part) for part in batch]

    def prepared_part(name: str, rows: slice) -> tuple[Tensor, int]:
        value = rows_of(name, rows).contiguous()
        shape, dtype = plan[name]
        if value.dtype != dtype or tuple(value.shape) != (rows.stop - rows.start, *shape[1:])[: len(shape)]:
            raise UserError(f"{name}: {value.dtype} {tuple(value.shape)} does not fit the plan; this is a bug")
        if not is_finite(value):
            raise UserError(f"{path} was not written: {name} holds NaN or infinity in {str(dtype).removeprefix('torch.')}")
        return value, checksum(value)

    def contents() -> Iterator[tuple[str, memoryview]]:
        batches = batches_of({name: plan[name][0] for name in names})
        for batch, results in zip(batches, on_matrices(batches, prepared), strict=True):
            for (name, rows), (value, total) in zip(batch, results, strict=True):
                sums[name, rows.start] = total
                yield name, bytes_of(value)

    with atomic_write(path) as temporary, open(temporary, "wb", buffering=BUFFER) as file, _Flusher(file) as stream:
        if is_safetensors:
            stream.write(safetensors_header(plan, metadata or None))
            for _, space in contents():
                stream.write(space)
        else:
            _write_pickled(stream, names, plan, contents(), counters)
        stream.flush_rest()  # the disk works on while the file is read back
        _verify(temporary, path, plan, sums)


def save_pickled(tensors: Mapping[str, Tensor], path: Path, counters: Mapping[str, Any] | None = None) -> None:
    """Write tensors that are in memory as a .ckpt or .pt file to `path` as it is, which is the caller's to make atomic.

    counters: see `write_weights`.
    """
    plan = plan_of(tensors)
    contents = ((name, bytes_of(value.detach().to("cpu").contiguous())) for name, value in tensors.items())
    with open(path, "wb") as file:
        _write_pickled(file, list(tensors), plan, contents, counters)


def plan_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The plan of tensors that are in memory."""
    return {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}


def parts_of(shape: tuple[int, ...]) -> list[slice]:
    """Rows of a tensor of this shape, a few MB at a time."""
    if not math.prod(shape) or not shape:
        return [slice(0, *shape[:1])] if shape else [slice(0, 1)]
    count = max(1, PART // math.prod(shape[1:]))
    return [slice(start, min(start + count, shape[0])) for start in range(0, shape[0], count)]


def batches_of(shapes: Mapping[str, tuple[int, ...]]) -> list[list[Part]]:
    """The parts of these tensors, in order, in batches of a few MB: a task for each small tensor costs more than its work."""
    batches: list[list[Part]] = []
    left = 0
    for name, shape in shapes.items():
        for rows in parts_of(shape):
            count = (rows.stop - rows.start) * math.prod(shape[1:])
            if not batches or count > left:
                batches.append([])
                left = PART
            batches[-1].append((name, rows))
            left -= count
    return batches


def _verify(written: Path, final: Path, plan: Plan, sums: Mapping[tuple[str, int], int]) -> None:
    """Read a file back; UserError unless every part of every tensor is what was to be written."""
    with open_tensors(written) as file:
        same = all((file.shapes.get(name), file.dtypes.get(name)) == kind for name, kind in plan.items())

        def wrong_in(batch: Sequence[Part]) -> list[str]:
            return [name for name, rows in batch if checksum(rows_in(file.view(name), rows)) != sums[name, rows.start]]

        batches = batches_of(file.shapes) if same else []
        wrong = [name for names in on_matrices(batches, wrong_in) for name in names]
    if wrong or not same:
        what = wrong[0] if wrong else "it"
        raise UserError(f"{final} was not written: {what} did not read back as it was written; check the disk")


def rows_in(value: Tensor, rows: slice) -> Tensor:
    """These rows of a tensor; all of one that is a single number."""
    return value[rows] if value.dim() else value


class _Flusher:
    """A file that is flushed to the disk while it is written, by a thread of its own: so the disk works from the start on."""

    def __init__(self, file: BinaryIO):
        self._file, self._left, self._pool = file, FLUSH_AFTER, ThreadPoolExecutor(1)
        self._flushing: Future | None = None
        self.tell, self.seek, self.flush, self.seekable = file.tell, file.seek, file.flush, file.seekable

    def write(self, space: bytes | memoryview) -> int:
        count = self._file.write(space)
        self._left -= count
        if self._left <= 0 and (self._flushing is None or self._flushing.done()):
            self.flush_rest()
        return count

    def flush_rest(self) -> None:
        """Begin to flush all that was written so far."""
        before, self._left = self._flushing, FLUSH_AFTER
        self._file.flush()
        self._flushing = self._pool.submit(_flush_after, before, self._file.fileno())

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        if self._flushing is not None:
            self._flushing.result()


def _flush_after(before: Future | None, descriptor: int) -> None:
    if before is not None:
        before.result()  # systems report a failure only once, so it must not be forgotten
    os.fsync(descriptor)


def safetensors_order(plan: Plan) -> list[str]:
    """The names in the order of a file's bytes: large dtypes first, as safetensors itself does, so every tensor is aligned."""
    return sorted(plan, key=lambda name: -plan[name][1].itemsize)


def safetensors_header(plan: Plan, metadata: Mapping[str, str] | None) -> bytes:
    """What stands before the tensors in a .safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in safetensors_order(plan):
        shape, dtype = plan[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Storage:
    """In place of a tensor's numbers in what is pickled: it becomes the storage whose bytes are the file's record of this key."""

    def __init__(self, key: str, dtype: torch.dtype, count: int):
        self.id = ("storage", getattr(torch, f"{_STORAGES[dtype]}Storage"), key, "cpu", count)


class _Stored:
    """In place of a tensor in what is pickled."""

    def __init__(self, key: str, shape: tuple[int, ...], dtype: torch.dtype):
        self.key, self.shape, self.dtype = key, shape, dtype

    def __reduce__(self) -> tuple[Any, ...]:
        storage = _Storage(self.key, self.dtype, math.prod(self.shape))
        stride = torch.empty(self.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.id if isinstance(value, _Storage) else None


def _write_pickled(
    stream: BinaryIO | _Flusher, names: Sequence[str], plan: Plan, contents: Contents, counters: Mapping[str, Any] | None
) -> None:
    """An archive that torch.load reads: the pickled dictionary, the version of this format, and a record for each tensor.

    torch.save needs all tensors at once, and adds records that the A1111 web UI's safe loader refuses.
    """
    if strange := [name for name in names if plan[name][1] not in _STORAGES]:
        raise UserError(f"{strange[0]} is {plan[strange[0]][1]}, which .ckpt has no place for; save it as .safetensors")
    tensors = {name: _Stored(str(index), *plan[name]) for index, name in enumerate(names)}
    pickled = BytesIO()
    _Pickler(pickled, protocol=2).dump(tensors if counters is None else {"state_dict": tensors, **counters})
    records = {"data.pkl": pickled.getvalue(), "version": b"3\n"}
    if sys.byteorder != "little":  # what readers assume, and the only one that the web UI's older loaders take
        records["byteorder"] = sys.byteorder.encode()
    with zipfile.ZipFile(cast(IO[bytes], stream), "w") as archive:
        for name, content in records.items():
            with _record(archive, stream, name, len(content)) as record:
                record.write(content)
        parts = itertools.groupby(contents, key=lambda part: part[0])
        for name, group in parts:
            shape, dtype = plan[name]
            with _record(archive, stream, f"data/{tensors[name].key}", math.prod(shape) * dtype.itemsize) as record:
                for _, space in group:
                    record.write(space)


def _record(archive: zipfile.ZipFile, stream: BinaryIO | _Flusher, name: str, size: int) -> IO[bytes]:
    record = zipfile.ZipInfo(f"archive/{name}")
    begin = stream.tell() + 30 + len(record.filename) + 4  # of the numbers, if nothing is filled in: after header, name and extra
    fill = -begin % ALIGNMENT
    record.extra = b"FB" + fill.to_bytes(2, "little") + b"Z" * fill
    record.file_size = size
    return archive.open(record, "w")


def bytes_of(value: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return value.view(-1).view(torch.uint8).numpy().data if value.numel() else memoryview(b"")


def checksum(value: Tensor) -> int:
    """A sum over the tensor's bytes, eight at a time: as fast as memory, and enough to tell a file that was cut or mangled."""
    flat = value.view(-1).view(torch.uint8) if value.numel() else torch.zeros(0, dtype=torch.uint8)
    whole = len(flat) // 8 * 8
    aligned = flat[:whole].view(torch.int64) if flat.data_ptr() % 8 == 0 else flat[:whole].clone().view(torch.int64)
    return int(aligned.sum()) * 31 + int(flat[whole:].sum(dtype=torch.int64))
