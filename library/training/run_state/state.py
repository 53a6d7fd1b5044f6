"""Folders that hold the state of a run: written whole or not at all, found again, and read without running code.

A state is some groups of tensors (.safetensors), some objects of tensors, numbers and texts (.pt, read with weights_only) and a
record (state.json), which is written last and lists size and checksum of every other file. So a folder with a record whose
files are as listed is whole, wherever a kill or a power cut came.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from library.errors import RunFailed, UserError, one_line
from library.files import WRITE_ERRORS
from library.formats.tensor_file import load_pickled, read_safetensors
from library.training.options import StateOptions
from library.training.outputs.saving import ModelFiles

RECORD = "state.json"
VERSION = 1


@dataclass
class State:
    """What a run, or a part of it, needs to go on. `record` is data for JSON. folder: where it was read from, for messages."""

    record: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    @classmethod
    def of(cls, parts: Iterable[State]) -> State:
        """The states of several parts as one; each has keys of its own."""
        whole = cls()
        for part in parts:
            whole.record |= part.record
            whole.tensors |= part.tensors
            whole.objects |= part.objects
        return whole


# ---------------------------------------------------------------- writing


def write_state(folder: Path, state: State, is_first: bool = True) -> None:
    """Write a state beside its final name, flush it to the disk, and rename it; an older one of that name goes after that.

    Raises RunFailed if it cannot be written or, which is tried with the first state of a run, could not be read safely.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        files = {name: write_file(temporary / name, content) for name, content in _contents(state, is_first)}
        record = {**state.record, "version": VERSION, "saved_at": time.time(), "files": files}
        write_file(temporary / RECORD, json.dumps(record, indent=1).encode())
        _sync_folder(temporary)
        _replace(folder, temporary)
    except WRITE_ERRORS as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise RunFailed(f"the state {folder} cannot be written: {reason}; check the folder and free space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _contents(state: State, is_first: bool) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the files of a state."""
    for name, tensors in state.tensors.items():
        yield f"{name}.safetensors", safetensors.torch.save({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
    for name, value in state.objects.items():
        buffer = io.BytesIO()
        torch.save({"value": value}, buffer)
        if is_first:
            _check_readable(buffer, name)
        yield f"{name}.pt", buffer.getvalue()


def _check_readable(buffer: io.BytesIO, name: str) -> None:
    """Raises RunFailed for a state that could not be read again: a third-party optimizer may keep anything in it."""
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RunFailed(
            f"the state of the {name} holds more than tensors, numbers and texts, so it cannot be saved; leave out --save_state"
        ) from error


def write_file(path: Path, content: bytes) -> list[int]:
    """Write a file, flush it to the disk, and give its size and checksum."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return [len(content), zlib.crc32(content)]


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk; Windows cannot, and need not."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(folder: Path, temporary: Path) -> None:
    """Give the new state its name. The old one is kept, whole and under a hidden name, until then."""
    old = None
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        os.replace(folder, old)
    os.replace(temporary, folder)
    _sync_folder(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------- finding and reading


def find_state(path: Path, output_name: str | None = None) -> Path:
    """The state that --resume names: the folder itself, or the newest whole one of the states in it.

    If the folder holds states of several runs, those of `output_name` are taken. Raises UserError if there is none.
    """
    if path.is_file():
        cure = f"give its folder {path.parent}" if (path.parent / RECORD).is_file() else f"give --network_weights={path}"
        raise UserError(f"--resume {path}: this is a file, and a state is a folder; {cure} to go on from it")
    if not path.is_dir():
        raise UserError(f"--resume {path}: there is no such folder; give a state folder, or the folder that holds them")
    if (path / RECORD).is_file():
        return path
    records = [(_record(folder), folder) for folder in sorted(path.iterdir()) if (folder / RECORD).is_file()]
    known = [(record, folder) for record, folder in records if isinstance(record, dict)]
    own = [(record, folder) for record, folder in known if record.get("output_name") == output_name] or known
    problems = [str(record) for record, _ in records if not isinstance(record, dict)]
    for record, folder in sorted(own, key=lambda pair: pair[0]["saved_at"], reverse=True):
        damage = _damage(folder, record)
        if damage is None:
            return folder
        problems.append(damage)
        tqdm.write(f"--resume {path}: {damage}; trying the state before it")
    found = f" ({'; '.join(problems)})" if problems else ""
    raise UserError(f"--resume {path}: it holds no whole state{found}; states are folders with a {RECORD}")


def _record(folder: Path) -> dict[str, Any] | str:
    """The record of a state, or what is wrong with it."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["version"] != VERSION:
            return f"{folder} was written by another version of this suite"
        return record if record["files"] and record["saved_at"] else f"{folder / RECORD} is damaged"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{folder / RECORD} cannot be read ({error})"


def _damage(folder: Path, record: dict[str, Any]) -> str | None:
    """What is wrong with the files of a state; None if it is whole."""
    for name, (size, checksum) in record["files"].items():
        try:
            content = (folder / name).read_bytes()
        except OSError:
            return f"{folder / name} is missing"
        if len(content) != size or zlib.crc32(content) != checksum:
            return f"{folder / name} is cut off or damaged"
    return None


def read_state(folder: Path) -> State:
    """A whole state with its tensors on the CPU. Raises UserError, naming the file, if something is missing or damaged."""
    record = _record(folder)
    if isinstance(record, str):
        raise _unusable(folder, record)
    problem = _damage(folder, record)
    if problem:
        raise _unusable(folder, problem)
    state = State(record, folder=folder)
    for name in record["files"]:
        stem, suffix = os.path.splitext(name)
        if suffix == ".safetensors":
            state.tensors[stem] = read_safetensors(folder / name)
        else:
            state.objects[stem] = load_pickled(folder / name)["value"]
    return state


def _unusable(folder: Path, problem: str) -> UserError:
    return UserError(f"--resume {folder}: {problem}; resume from another state")


# ---------------------------------------------------------------- names and old ones


class StateFiles:
    """Names and rotation of the states of one run. Their names are those of the network's files with `-state` at the end."""

    def __init__(self, options: StateOptions, files: ModelFiles) -> None:
        self.options, self.files = options, files
        self.saved = 0

    @property
    def at_saves(self) -> bool:
        """Whether a state is saved with every file of the network."""
        return self.options.save_state

    @property
    def at_end(self) -> bool:
        """Whether a state is saved when the run ends."""
        return self.options.save_state or self.options.save_state_on_train_end

    def save(self, folder: Path, state: State) -> None:
        """Write a state, then remove what kills of earlier runs of this name left half-done; upload it if that is asked for."""
        write_state(folder, state, is_first=not self.saved)
        self.saved += 1
        self._remove_leftovers()
        if self.files.uploads:
            self.files.uploads.state(folder)

    def epoch_path(self, epoch: int) -> Path:
        """`name-000003-state`."""
        return _named(self.files.epoch_path(epoch))

    def step_path(self, step: int) -> Path:
        """`name-step00000200-state`."""
        return _named(self.files.step_path(step))

    def final_path(self) -> Path:
        """`name-state`."""
        return _named(self.files.final_path())

    def remove_old_epoch(self, epoch: int, interval: int) -> None:
        """After the state of `epoch`: keep the last --save_last_n_epochs_state states (unset: --save_last_n_epochs)."""
        kept = self.options.save_last_n_epochs_state or self.files.options.save_last_n_epochs
        if kept and epoch - interval * kept >= 0:
            self._remove(self.epoch_path(epoch - interval * kept))

    def remove_old_step(self, step: int, interval: int) -> None:
        """After the state of `step`: drop the one over --save_last_n_steps_state steps older (unset: --save_last_n_steps)."""
        kept = self.options.save_last_n_steps_state or self.files.options.save_last_n_steps
        if kept and step - kept - 1 >= interval:
            old = step - kept - 1
            self._remove(self.step_path(old - old % interval))

    def _remove_leftovers(self) -> None:
        name = re.escape(self.files.options.output_name or "")
        pattern = re.compile(rf"\.{name or '(epoch|at|last)'}(-\d{{6}}|-step\d{{8}})?-state\.[0-9a-f]{{8}}")
        for path in self.files.folder.glob(".*-state.*"):
            if pattern.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            # A folder with the name of a state is whole, so one that is being removed gets another name first.
            if self.files.uploads:
                self.files.uploads.before_removal()
            hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
            os.replace(path, hidden)
            (hidden / RECORD).unlink(missing_ok=True)
            shutil.rmtree(hidden, ignore_errors=True)
            tqdm.write(f"removed {path}")


def _named(file: Path) -> Path:
    return file.with_name(f"{file.name.removesuffix(file.suffix)}-state")
