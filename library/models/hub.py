"""Models of the Hugging Face hub. One request checks the hub first, so that a run without network ends without many retries.

If the hub does not answer, files that were downloaded before are used. Heavy libraries are imported after that request.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.errors import UserError
from library.formats.tensor_file import MODEL_SUFFIXES
from library.imports import import_model_libraries

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

TIMEOUT = 10.0  # seconds


def download_model(name: str) -> Path:
    """The local copy of a model on the hub, downloaded if needed. Raises UserError if it is not available."""
    only_local = not _hub_answers(name, ("model_index.json",))
    import_model_libraries()
    from diffusers import DiffusionPipeline

    try:
        with _quiet():
            folder = DiffusionPipeline.download(name, safety_checker=None, feature_extractor=None, local_files_only=only_local)
    except Exception as error:  # the hub's clients raise errors of many libraries
        raise _unavailable(name, error) from error
    return Path(folder)


def download_configs(name: str) -> Path:
    """A folder with the configurations of a model on the hub, without weights. Raises UserError if they are not available."""
    only_local = not _hub_answers(name, ("model_index.json",))
    from huggingface_hub import snapshot_download

    try:
        with _quiet():
            return Path(snapshot_download(name, allow_patterns=["*.json", "*/*.json"], local_files_only=only_local))
    except Exception as error:  # the hub's clients raise errors of many libraries
        raise _unavailable(name, error) from error


def download_vae(name: str, dtype: torch.dtype | None) -> AutoencoderKL:
    """The VAE of a repository on the hub: at its top, or in its folder `vae`. Raises UserError if it is not available."""
    only_local = not _hub_answers(name, ("config.json", "vae/config.json"))
    import_model_libraries()
    from diffusers import AutoencoderKL

    options = {"torch_dtype": dtype, "local_files_only": only_local}
    try:
        with _quiet():
            try:
                return AutoencoderKL.from_pretrained(name, **options)
            except OSError:
                return AutoencoderKL.from_pretrained(name, subfolder="vae", **options)
    except Exception as error:
        raise _unavailable(name, error) from error


def _hub_answers(name: str, files: tuple[str, ...]) -> bool:
    """Whether the hub answers that it has this model. False if it does not, but one of `files` was downloaded before.

    Raises UserError if neither is true, or if no model on the hub can have this name. With HF_HUB_OFFLINE the hub never answers.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    wrong_path = UserError(f"there is no file or folder {name}; check the path")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.lower().endswith(MODEL_SUFFIXES):
        raise wrong_path
    try:
        fetched_before = any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except ValueError as error:  # not a valid name on the hub
        raise wrong_path from error
    try:
        HfApi().model_info(name, timeout=TIMEOUT)
    except Exception as error:  # no network, HF_HUB_OFFLINE, no such model, ...
        if not fetched_before:
            raise _unavailable(name, error) from error
        return False
    return True


def _unavailable(name: str, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).strip().splitlines()[0].partition(". ")[0][:200]
    return UserError(
        f"{name} is neither a file nor a folder here, and is not available from the Hugging Face hub ({reason}); give a path"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and log messages of the libraries. Errors are raised, and progress bars stay."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
