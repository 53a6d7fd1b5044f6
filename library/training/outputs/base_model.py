"""What the metadata say of the base model: names and hashes of its files."""

from __future__ import annotations

import logging
from pathlib import Path

from library.files import legacy_hash_of_file, sha256_of_file
from library.training.options import ModelOptions

log = logging.getLogger(__name__)


def all_model_facts(options: ModelOptions) -> dict[str, str]:
    """Names and hashes of the base model and, if one is given, of the VAE."""
    vae = model_facts("vae", options.vae) if options.vae else {}
    return model_facts("sd_model", options.source) | vae


def model_facts(kind: str, name_or_path: str) -> dict[str, str]:
    """Name and hashes of a model; a hub id has no hashes, of a folder they say that it is one."""
    path = Path(name_or_path)
    facts = {f"ss_{kind}_name": path.name if path.exists() else name_or_path}
    if path.is_dir():
        facts |= {f"ss_{kind}_hash": "IsADirectory", f"ss_new_{kind}_hash": "IsADirectory"}
    elif path.is_file():
        try:
            facts |= {f"ss_{kind}_hash": legacy_hash_of_file(path), f"ss_new_{kind}_hash": sha256_of_file(path)}
        except OSError as error:  # must not keep what was trained from being saved
            log.warning("the hashes of %s are not recorded: %s", path, error.strerror or error)
    return facts
