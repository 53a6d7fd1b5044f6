"""Logging to TensorBoard and wandb."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from tqdm import tqdm

from library.command_line import option_fields
from library.errors import UserError, one_line
from library.option_traits import traits_of
from library.safe_text import as_data
from library.text_files import parse_toml, read_text
from library.training.options import LogOptions
from library.training.outputs.tracking import LossRecord, StepLoss


class Tracker:
    """TensorBoard and wandb, as --log_with asks for; does nothing without --logging_dir and --log_with.

    Tags: loss/current, loss/average, lr/<group>, lr/d*lr/<group> by step; loss/epoch_average by epoch; sample images. The
    failure of a tracker while training is printed once, and it is not used any more.
    """

    def __init__(self, options: LogOptions, config: Mapping[str, Any] | None = None, active: bool = True) -> None:
        """config: what --log_config records. active: whether this process logs; of several only the main one does."""
        self._step = 0
        self._trackers = start_trackers(options, config) if active else []

    def log_step(
        self, step: int, rates: Mapping[str, float], found_rates: Mapping[str, float], loss: StepLoss | None = None
    ) -> None:
        """Learning rates by group and the loss of a step. found_rates: those in force where the optimizer finds them itself."""
        values = {f"lr/{name}": rate for name, rate in rates.items()}
        values |= {f"lr/d*lr/{name}": rate for name, rate in found_rates.items()}
        if loss is not None:
            values |= {"loss/current": loss.current, "loss/average": loss.average}
        self.log(values, step)

    def log_epoch(self, epoch: int, losses: LossRecord) -> None:
        """The mean loss over the epoch."""
        if losses.average is not None:
            self.log({"loss/epoch_average": losses.average}, epoch, by_epoch=True)

    def log_validation(self, name: str, at: int, loss: float, losses: LossRecord) -> None:
        """A validation's loss by step or by epoch (`name`), and how far it is above that of training."""
        tags = {f"loss/validation/{name}_average": loss}
        if losses.average is not None:
            tags[f"loss/validation/{name}_divergence"] = loss - losses.average
        self.log(tags, at, by_epoch=name == "epoch")

    def log(self, values: dict[str, float], at: int, *, by_epoch: bool = False) -> None:
        """Values at a step or an epoch. wandb knows steps alone, which may not go back: it gets the epoch as a value."""
        self._step = self._step if by_epoch else at
        for tracker in list(self._trackers):
            if by_epoch and tracker.name == "wandb":
                self._safely(tracker, tracker.log, {**values, "epoch": at}, step=self._step)
            else:
                self._safely(tracker, tracker.log, values, step=at)

    def log_images(self, step: int, images: dict[str, Image.Image]) -> None:
        """Sample images by tag."""
        for tracker in list(self._trackers):
            if tracker.name == "wandb":
                self._safely(tracker, tracker.log_images, {tag: [image] for tag, image in images.items()}, step=step)
            else:
                arrays = {tag: np.asarray(image)[None] for tag, image in images.items()}
                self._safely(tracker, tracker.log_images, arrays, step=step, dataformats="NHWC")

    def finish(self) -> None:
        """Write out what is buffered."""
        for tracker in list(self._trackers):
            self._safely(tracker, tracker.finish)

    def _safely(self, tracker: Any, work: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            work(*args, **kwargs)
        except Exception as error:  # a full disk or a lost network must not end the training
            self._trackers.remove(tracker)
            tqdm.write(f"{tracker.name} logs no more: {' '.join(str(error).split())[:200] or type(error).__name__}")


def start_trackers(options: LogOptions, config: Mapping[str, Any] | None) -> list[Any]:
    """The trackers that were asked for. Raises UserError if one is not installed or cannot start."""
    started = []
    settings = tracker_settings(options)
    name = options.log_tracker_name or "network_train"
    if wants(options, "tensorboard"):
        from accelerate.tracking import TensorBoardTracker

        folder = logging_folder(options)
        own = settings.get("tensorboard", {})
        silence_writer_thread()
        started.append(_started("tensorboard", lambda: TensorBoardTracker(name, folder, **own), config))
    if wants(options, "wandb"):
        from accelerate.tracking import WandBTracker

        named = {"name": options.wandb_run_name} if options.wandb_run_name else {}
        folder = logging_folder(options)
        if folder:
            named["dir"] = folder
        log_in_to_wandb(options)
        started.append(_started("wandb", lambda: WandBTracker(name, **{**named, **settings.get("wandb", {})}), config))
    return started


def silence_writer_thread() -> None:
    """Print no traceback of the thread in which TensorBoard writes: its next call raises the same error, which is one line."""
    others = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if type(failed.thread).__name__ != "_AsyncWriterThread":
            others(failed)

    threading.excepthook = hook


def _started(name: str, make: Callable[[], Any], config: Mapping[str, Any] | None) -> Any:
    try:
        tracker = make()
        tracker.start()
        if config:
            tracker.store_init_configuration(as_data(dict(config)))
    except Exception as error:
        reason = one_line(error, 200)
        cure = (
            "; without network set the environment variable WANDB_MODE=offline"
            if name == "wandb"
            else "; check --log_tracker_config"
        )
        if isinstance(error, ImportError):  # something that it needs is missing
            cure = f"; run: pip install --upgrade {name}"
        elif isinstance(error, UnicodeError):
            cure = "; it takes names in Unicode alone: change --logging_dir, --log_prefix or --log_tracker_name"
        raise UserError(f"--log_with {name} cannot start: {reason}{cure}") from error
    return tracker


def wants(options: LogOptions, name: str) -> bool:
    """Whether this tracker is asked for; --logging_dir alone means TensorBoard."""
    return options.log_with in (name, "all") or (name == "tensorboard" and bool(options.logging_dir) and not options.log_with)


def check_trackers(options: LogOptions) -> None:
    """Whether the packages are there and the settings can be read. Raises UserError."""
    for name in ("tensorboard", "wandb"):
        spec = importlib.util.find_spec(name) if wants(options, name) else None
        if wants(options, name) and (
            spec is None or spec.origin is None
        ):  # without origin: a folder of that name, such as wandb leaves behind
            raise UserError(f"--log_with {name} needs the package '{name}'; run: pip install {name}")
    tracker_settings(options)
    logging_folder(options)


def tracker_settings(options: LogOptions) -> dict[str, dict[str, Any]]:
    """What --log_tracker_config says for the start of each tracker: tables [tensorboard] and [wandb]."""
    if not options.log_tracker_config:
        return {}
    path = Path(options.log_tracker_config)
    settings = parse_toml(read_text(path, "--log_tracker_config"), path)
    for name, table in settings.items():
        if name not in ("tensorboard", "wandb") or not isinstance(table, dict):
            raise UserError(f"--log_tracker_config {path}: '{name}' is not one of the tables [tensorboard] and [wandb]")
    return settings


def log_in_to_wandb(options: LogOptions) -> None:
    """Log in with --wandb_api_key, which is written nowhere."""
    if options.wandb_api_key:
        import wandb

        wandb.login(key=options.wandb_api_key)


def logged_options(options: BaseModel) -> dict[str, Any]:
    """For --log_config: options that differ from their default, without paths and secrets."""
    fields = option_fields(type(options))
    values = {name: value for group in options.model_dump().values() for name, value in group.items()}
    changed = {
        name: value for name, value in values.items()
        if value != fields[name].get_default() and not is_private(fields[name], value)
    }  # fmt: skip
    return {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in changed.items()}


def is_private(field: FieldInfo, value: Any) -> bool:
    """Whether an option is a secret or holds a path: by its declaration, and any text that looks like a path."""
    texts = value if isinstance(value, (list, tuple)) else [value]
    looks_like_path = any(isinstance(text, str) and ("/" in text or "\\" in text) for text in texts)
    return looks_like_path or traits_of(field).secret or traits_of(field).path


def logging_folder(options: LogOptions) -> str | None:
    """`<logging_dir>/<log_prefix><time>`; None without --logging_dir."""
    if not options.logging_dir:
        return None
    folder = Path(options.logging_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--logging_dir {folder} cannot be made: {error.strerror}; choose another folder") from error
    return str(folder / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}")
