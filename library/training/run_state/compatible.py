"""Whether a state is of this run: same network, data and options; else what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from library.command_line import option_fields
from library.data.config_keys import SubsetConfig
from library.data.table import ImageTable
from library.errors import UserError, counted, listed
from library.models.family import Model
from library.option_traits import fields_with, traits_of
from library.safe_text import bytes_of
from library.training.options import TrainNetworkOptions

START_ANEW = "to go on from its weights with other settings, give --network_weights a saved file instead of --resume"


def fingerprint(options: TrainNetworkOptions, table: ImageTable, model: str, processes: int) -> dict[str, Any]:
    """What a state remembers of its run, as data for JSON. `model`: its `model_digest`."""
    return {**early_fingerprint(options, table, processes), "model": model}


def early_fingerprint(options: TrainNetworkOptions, table: ImageTable, processes: int) -> dict[str, Any]:
    """The part of it that is known before the model is loaded."""
    return {
        "options": option_values(options),
        "processes": processes,
        "data": data_digests(table),
        "settings": data_settings(table),
    }


def decisive_values(options: BaseModel) -> dict[str, Any]:
    """All options of the groups that decide what is trained, as data for JSON."""
    groups = [group for _, group in options if group.decides_what_is_trained]
    return {name: value for group in groups for name, value in group.model_dump(mode="json").items()}


def option_values(options: BaseModel) -> dict[str, Any]:
    """The options that must stay the same. Of files the name counts and not the folder, since they may have moved."""
    values, fields = decisive_values(options), option_fields(type(options))
    values["cache_latents"] = values["cache_latents"] or values["cache_latents_to_disk"]
    rules = {name: traits_of(fields[name]).resume for name in values}
    return {
        name: _file_names(value) if rules[name] == "file name" else value
        for name, value in values.items() if rules[name] != "free"
    }  # fmt: skip


def _file_names(value: Any) -> Any:
    if isinstance(value, list):
        return [_file_names(one) for one in value]
    return value if value is None else Path(value).name


def data_digests(table: ImageTable) -> dict[str, Any]:
    """Numbers and checksums over the images, their captions and their cuts; not over what the files hold."""
    cuts = hashlib.sha256()
    for column in (table.bucket, table.sizes, table.resized, table.corner):
        cuts.update(column.tobytes())
    return {
        "number of images": len(table),
        "names of the images": _digest(table.names),
        "captions": _digest(table.captions),
        "sizes of the images": cuts.hexdigest(),
        "repeats, or which images are held out": hashlib.sha256(table.repeats.tobytes()).hexdigest(),
    }


def data_settings(table: ImageTable) -> dict[str, Any]:
    """Every key of every dataset and subset; of folders the name alone, since they may have moved."""
    settings: dict[str, Any] = {}
    folders = set(fields_with(SubsetConfig, path=(True,)))
    for number, config in enumerate(table.configs, start=1):
        values = config.model_dump(mode="json")
        for part, subset in enumerate(values.pop("subsets"), start=1):
            for key, value in subset.items():
                value = Path(value).name if key in folders and value else value
                settings[f"{key} of dataset {number}, subset {part}"] = value
        settings |= {f"{key} of dataset {number}": value for key, value in values.items()}
    return settings


def model_digest(model: Model) -> str:
    """A checksum over the first values of every weight of the frozen model, which is quick and differs between models."""
    digest = hashlib.sha256()
    for part in (model.denoiser, *model.text_encoders, model.vae):
        starts = [weight.detach().flatten()[:8].float() for weight in part.parameters()]
        digest.update(torch.cat(starts).cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(bytes_of(text) + b"\0")
    return digest.hexdigest()


def check_same_run(record: Mapping[str, Any], now: dict[str, Any], folder: Path) -> None:
    """UserError that names what differs between the state's run and this one."""
    found = differences(record["run"], now)
    if found:
        raise UserError(f"--resume {folder} is the state of another run: {listed(found, 6, '; ')}; {START_ANEW}")


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, in words. `now` may lack parts that are not known yet."""
    return list(_differences(then, now))


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name, value in now["options"].items():
        if name in then["options"] and then["options"][name] != value:
            yield f"--{name} was {_shown(then['options'][name])} and is {_shown(value)}"
    if then["processes"] != now["processes"]:
        yield f"it was trained in {counted(then['processes'], 'process', 'processes')} and now in {now['processes']}"
    settings = {key: (then["settings"].get(key), now["settings"].get(key)) for key in {**then["settings"], **now["settings"]}}
    yield from (f"{key} was {_shown(a)} and is {_shown(b)}" for key, (a, b) in settings.items() if a != b)
    for name, value in now["data"].items():
        if then["data"].get(name) != value:
            counts = f" ({then['data'].get(name)} then, {value} now)" if isinstance(value, int) else ""
            yield f"the {name} changed{counts}"
    if now.get("model") not in (None, then["model"]):
        yield "the base model has other weights"


def _shown(value: Any) -> str:
    return "unset" if value in (None, "") else str(value)
