"""Files of a run: their names, writing them whole and free of NaN, and removing old ones."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from library.devices import DTYPES
from library.errors import RunFailed, UserError
from library.files import atomic_write
from library.formats.tensor_file import load_pickled
from library.training.hub import Uploads
from library.training.options import OutputOptions


class ModelFiles:
    """Names and rotation of the network files of one run.

    Files are written within `weights_to_use()`, where the network has the weights that are meant to be used.
    """

    def __init__(
        self, options: OutputOptions, weights_to_use: Callable[[], AbstractContextManager] = nullcontext,
        uploads: Uploads | None = None, writes: bool = True,
    ) -> None:  # fmt: skip
        """writes: whether this process writes files; in a run of several only the main one does."""
        self.options, self.weights_to_use = options, weights_to_use
        self.uploads, self.writes = uploads, writes
        self.folder = Path(options.output_dir)
        self.written: list[Path] = []

    def check_folder(self) -> None:
        """Find out before training that nothing could be saved after it."""
        name = self.options.output_name or ""
        if set(name) & set('/\\:*?"<>|') or len(os.fsencode(name)) > 200:
            raise UserError(
                f"--output_name {name[:40]} is no file name; folders go into --output_dir, and 200 letters are enough"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise UserError(f"--output_dir {self.folder} cannot be written: {error.strerror}; choose another folder") from error

    def epoch_path(self, epoch: int) -> Path:
        """`name-000003.safetensors`; without --output_name: `epoch-000003.safetensors`."""
        return self._path(f"{self.options.output_name or 'epoch'}-{epoch:06d}")

    def step_path(self, step: int) -> Path:
        """`name-step00000200.safetensors`; without --output_name: `at-step00000200.safetensors`."""
        return self._path(f"{self.options.output_name or 'at'}-step{step:08d}")

    def final_path(self) -> Path:
        """`name.safetensors`; without --output_name: `last.safetensors`."""
        return self._path(self.options.output_name or "last")

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

    def save(self, path: Path, network: torch.nn.Module, metadata: dict[str, str]) -> None:
        """Write the network under its final name only when the file is whole and holds no NaN."""
        if not self.writes:
            return
        dtype = DTYPES[self.options.save_precision] if self.options.save_precision else None
        with atomic_write(path) as temporary, self.weights_to_use():
            try:
                network.save_weights(str(temporary), dtype, metadata)
            except ValueError as error:
                raise RunFailed(f"{path} was not written: {error}") from error
            check_finite(temporary, path)
        self.written = [other for other in self.written if other != path] + [path]
        if self.uploads:
            self.uploads.file(path, last=path == self.final_path())

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
    with safe_open(file, framework="pt") as content:
        for name in content.keys():
            yield name, content.get_tensor(name)
