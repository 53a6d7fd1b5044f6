"""Files of a run: their names, writing them whole and free of NaN, and removing old ones."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from library.devices import DTYPES
from library.errors import RunFailed, UserError, one_line
from library.files import atomic_write, write_new
from library.formats.tensor_file import load_pickled, open_tensors
from library.formats.tensor_output import save_pickled
from library.network_modules import AdapterNetwork
from library.safe_text import as_unicode, on_terminal
from library.training.options import OutputOptions
from library.training.outputs.hub import Uploads


class NotSaved(RunFailed):
    """A file of the run could not be written under its name. The message says where its weights are instead."""


class ModelFiles:
    """Names and rotation of the network files of one run.

    Files are written within `eval_weights()`, where the network has the weights that are meant to be used.
    """

    def __init__(
        self, options: OutputOptions, eval_weights: Callable[[], AbstractContextManager] = nullcontext,
        uploads: Uploads | None = None, writes: bool = True,
    ) -> None:  # fmt: skip
        """writes: whether this process writes files; in a run of several only the main one does."""
        self.options, self.eval_weights = options, eval_weights
        self.uploads, self.writes = uploads, writes
        self.folder = options.folder
        self.written: list[Path] = []

    def check_folder(self) -> None:
        """Find out before training that nothing could be saved after it."""
        name = self.options.output_name or ""
        if set(name) & set('/\\:*?"<>|\t\n') or on_terminal(name) != name or len(os.fsencode(name)) > 200:
            raise UserError(
                f"--output_name {as_unicode(name)[:40]!r} is no file name; folders go into --output_dir, its letters must be "
                "Unicode, and 200 bytes are enough"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".probe-", dir=self.folder) as probe:
                longest = Path(probe) / self.step_path(10**8 - 1).name
                save_file({"probe": torch.zeros(1)}, longest)  # by the library and with a name as for the weights
        except Exception as error:  # safetensors has errors of its own
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UserError(f"--output_dir {self.folder} cannot be written: {reason}; choose another folder") from error
        for path in sorted(self.folder.iterdir()) if os.access(self.folder, os.R_OK) else ():
            if self._is_in_the_way(path):
                kind = "folder" if path.is_dir() else "file"
                raise UserError(f"{path} is a {kind}, and the run writes its own there; move it, or give another --output_name")

    def _is_in_the_way(self, path: Path) -> bool:
        """Whether it is a folder where a file of the network would be, or a file where a state would be."""
        name = self.options.output_name
        stems = rf"{re.escape(name)}(?:-\d{{6}}|-step\d{{8}}|-best)?" if name else r"epoch-\d{6}|at-step\d{8}|last|best"
        own = re.fullmatch(rf"(?:{stems})(-state|\.{self.options.save_model_as})", path.name)
        return own is not None and path.is_dir() != (own[1] == "-state")

    def epoch_path(self, epoch: int) -> Path:
        """`name-000003.safetensors`; without --output_name: `epoch-000003.safetensors`."""
        return self._path(f"{self.options.output_name or 'epoch'}-{epoch:06d}")

    def step_path(self, step: int) -> Path:
        """`name-step00000200.safetensors`; without --output_name: `at-step00000200.safetensors`."""
        return self._path(f"{self.options.output_name or 'at'}-step{step:08d}")

    def final_path(self) -> Path:
        """`name.safetensors`; without --output_name: `last.safetensors`."""
        return self._path(self.options.file_stem)

    def best_path(self) -> Path:
        """`name-best.safetensors`; without --output_name: `best.safetensors`."""
        return self._path(f"{self.options.output_name}-best" if self.options.output_name else "best")

    def _path(self, stem: str) -> Path:
        return self.folder / f"{stem}.{self.options.save_model_as}"

    def epoch_interval(self, epochs: int) -> int | None:
        """Save after every how many epochs; --save_n_epoch_ratio N means about N files in all."""
        if self.options.save_n_epoch_ratio:
            return max(1, epochs // self.options.save_n_epoch_ratio)
        return self.options.save_every_n_epochs

    def save(self, path: Path, network: AdapterNetwork, metadata: dict[str, str]) -> None:
        """Write the network under its final name only when the file is whole and holds no NaN.

        If that fails for any other reason, it is written elsewhere: see `keep_elsewhere`. Raises NotSaved then.
        """
        if not self.writes:
            return

        def write(temporary: Path) -> None:
            self._write(temporary, network, metadata, shown_as=path)

        try:
            with atomic_write(path) as temporary:
                write(temporary)
        except RunFailed:  # what the network holds must not be saved
            raise
        except Exception as error:  # a full disk, rights, or anything that a network module of others raises
            with self.eval_weights():
                weights = dict(network.state_dict())
            kept = keep_elsewhere(path, write, lambda temporary: write_plain(temporary, weights, shown_as=path))
            where = (
                f"its weights are in {kept} instead" if kept else "no other folder took its weights; make room and train again"
            )
            raise NotSaved(f"{path} was not saved ({one_line(error)}); {where}") from error
        self.written = [other for other in self.written if other != path] + [path]
        if self.uploads:
            self.uploads.file(path, last=path == self.final_path())

    def _write(self, file: Path, network: AdapterNetwork, metadata: dict[str, str], shown_as: Path) -> None:
        dtype = DTYPES[self.options.save_precision] if self.options.save_precision else None
        with self.eval_weights():
            try:
                network.save_weights(str(file), dtype, metadata)
            except UnicodeError:  # a ValueError too, but one of the name or the metadata
                raise
            except ValueError as error:
                raise RunFailed(f"{shown_as} was not written: {error}") from error
        check_finite(file, shown_as)
        if file.suffix != ".safetensors":
            write_plainly(file)

    def remove_old_epoch(self, epoch: int, interval: int) -> None:
        """After the save of `epoch`: keep the last --save_last_n_epochs epoch files."""
        if self.options.save_last_n_epochs:
            self._remove(epoch - interval * self.options.save_last_n_epochs, self.epoch_path)

    def remove_old_step(self, step: int, interval: int) -> None:
        """After the save of `step`: drop the file that is more than --save_last_n_steps steps older."""
        if self.options.save_last_n_steps:
            old = step - self.options.save_last_n_steps - 1
            self._remove(old - old % interval, self.step_path)

    def _remove(self, number: int, name: Any) -> None:
        path = name(number) if number >= 0 and self.writes else None
        if path and path.exists():
            if self.uploads:
                self.uploads.before_removal()
            path.unlink()
            self.written = [kept for kept in self.written if kept != path]
            tqdm.write(f"removed {path}")


def keep_elsewhere(path: Path, *writers: Callable[[Path], object]) -> Path | None:
    """Write what belongs into `path` to the first other place that takes it, under a name that is free; None if none does.

    Tried are another name beside `path`, the temporary folder, the home folder and the current one, with each writer in turn.
    """
    for write in writers:
        for folder in _other_folders(path.parent):
            with suppress(Exception):
                return write_new(_plain_names(folder, path), write)
    return None


def _other_folders(first: Path) -> Iterator[Path]:
    yield first
    for folder in (tempfile.gettempdir, Path.home, Path.cwd):
        with suppress(OSError, RuntimeError):  # there may be none
            yield Path(folder())


def _plain_names(folder: Path, path: Path) -> Iterator[Path]:
    """Names that any file system takes, without end."""
    stem = "".join(letter if letter.isascii() and letter.isalnum() or letter in "-_" else "_" for letter in path.stem)[:100]
    return (folder / f"{stem}-rescued{f'-{number}' if number else ''}{path.suffix}" for number in count())


def write_plain(file: Path, weights: dict[str, torch.Tensor], shown_as: Path) -> None:
    """Write a network's state as it is, without its module's help."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    save_file(tensors, file) if file.suffix == ".safetensors" else save_pickled(tensors, file)
    check_finite(file, shown_as)


def write_plainly(file: Path) -> None:
    """Rewrite a pickled file without the records that torch.save adds, for which the A1111 web UI refuses it."""
    content = load_pickled(file)
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        save_pickled(content, file)


def check_finite(file: Path, shown_as: Path) -> None:
    """Refuse a network file that holds a NaN or an infinity, whatever module wrote it."""
    for name, tensor in _tensors(file):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RunFailed(
                f"{shown_as} was not written: {name} holds NaN or infinity; lower --learning_rate or use --mixed_precision bf16"
            )


def _tensors(file: Path):
    if file.suffix != ".safetensors":
        yield from load_pickled(file).items()
        return
    with open_tensors(file) as content:
        for name in content.shapes:
            yield name, content.read(name)
