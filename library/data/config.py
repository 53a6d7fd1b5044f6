"""From a dataset file or folders to complete datasets: which key may stand where, which value wins, and what is refused.

A value is taken from the first place that has one: subset, dataset, [general], command line, default.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from library.data.config_file import read_config_file
from library.data.config_keys import (
    DATASET_KEYS,
    SHARED_KEYS,
    SUBSET_ONLY,
    DatasetConfig,
    DatasetDefaults,
    SubsetConfig,
    describe_problem,
    optional_keys,
)
from library.data.folders import check_pictures, picture_subsets
from library.errors import UserError, unknown

__all__ = ["DatasetConfig", "DatasetDefaults", "SubsetConfig", "datasets_from_file", "datasets_from_folders", "datasets_from_metadata"]

log = logging.getLogger(__name__)

# The ecosystem knows these keys, each with the reason why it is refused unless it asks for nothing.
REFUSED = {
    "custom_attributes": "prior preservation is done with is_reg pictures here; take it out",
    "network_multiplier": "sd-scripts takes it and does nothing with it; take it out",
    "cache_info": "sizes are read from picture headers at every start, which is fast, and captions anew; take it out",
}
HARMLESS = {"custom_attributes": {}, "network_multiplier": 1.0, "cache_info": False}
# What a subset with a metadata_file takes from that file.
NOT_WITH_METADATA = ("is_reg", "class_tokens", "caption_extension")
COMMAND_LINE_ONLY = ("prior_loss_weight", "max_token_length", "debug_dataset")

_DATASET_TABLE = optional_keys("DatasetTable", DATASET_KEYS + SHARED_KEYS)
_SUBSET_TABLE = optional_keys("SubsetTable", SUBSET_ONLY + SHARED_KEYS)
_GENERAL, _DATASET, _SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"


def datasets_from_file(path: Path, defaults: DatasetDefaults) -> list[DatasetConfig]:
    """Read `--dataset_config`. Raises UserError, naming file, table and key, for whatever is wrong in it."""
    path = Path(path)
    tables = read_config_file(path)
    _refuse_wrong_keys(tables, ("general", "datasets"), f"{path}, top level")
    general = tables.get("general", {})
    if not isinstance(general, dict):
        raise UserError(f"{path}: write {_GENERAL} once, with single brackets")
    general = _checked(_DATASET_TABLE, general, f"{path}, {_GENERAL}")
    datasets = []
    for number, table in enumerate(_list_of_tables(tables, "datasets", _DATASET, str(path)), start=1):
        place = f"{path}, {_DATASET} {number}"
        _refuse_wrong_keys(table, ("subsets", *_DATASET_TABLE.model_fields), place)
        subset_tables = _list_of_tables(table, "subsets", _SUBSET, place)
        table = {key: value for key, value in table.items() if key != "subsets"}
        _refuse_mixture(subset_tables, place)
        in_file = {**general, **_checked(_DATASET_TABLE, table, place)}
        values = {**defaults.model_dump(exclude_none=True), **in_file}
        subsets = _subsets_from_tables(subset_tables, values, path, place)
        datasets.append(_dataset(values, subsets, place))
        _warn_without_effect(in_file, datasets[-1], place)
    return datasets


def datasets_from_folders(
    train_data_dir: Path, reg_data_dir: Path | None, defaults: DatasetDefaults, masks: Path | None = None
) -> list[DatasetConfig]:
    """One dataset from `--train_data_dir` and `--reg_data_dir`: see `folders.picture_subsets` for which folders are used.

    `masks` (`--conditioning_data_dir`) holds the same folders as `train_data_dir` again, with the masks of the pictures.
    """
    values = defaults.model_dump(exclude_none=True)
    subsets = []
    for option, parent, is_reg in (("--train_data_dir", train_data_dir, False), ("--reg_data_dir", reg_data_dir, True)):
        for found in picture_subsets(Path(parent), option) if parent else ():
            own = {"num_repeats": found.num_repeats, "class_tokens": found.class_tokens}
            own = {key: value for key, value in own.items() if value is not None}
            if masks and not is_reg:
                own["conditioning_data_dir"] = masks / found.image_dir.relative_to(parent)
                if not own["conditioning_data_dir"].is_dir():
                    raise UserError(f"--conditioning_data_dir={masks}: there is no folder {own['conditioning_data_dir']} for {found.image_dir}")
            subset = _subset({**values, **own, "image_dir": found.image_dir, "is_reg": is_reg}, str(found.image_dir))
            check_pictures(subset.image_dir, subset.caption_extension, option)
            subsets.append(subset)
    return [_dataset(values, subsets, f"--train_data_dir={train_data_dir}")]


def datasets_from_metadata(in_json: Path, image_dir: Path | None, defaults: DatasetDefaults) -> list[DatasetConfig]:
    """One dataset from `--in_json`, whose pictures lie in `--train_data_dir`, else where the file says or beside it."""
    where = f"--in_json={in_json}"
    if not Path(in_json).is_file():
        raise UserError(f"{where}: no such file; looked in {Path.cwd()}")
    if image_dir is not None and not Path(image_dir).is_dir():
        raise UserError(f"--train_data_dir={image_dir}: no such folder; looked in {Path.cwd()}")
    values = defaults.model_dump(exclude_none=True)
    subset = _subset({**values, "metadata_file": in_json, "image_dir": image_dir or Path(in_json).parent}, where)
    return [_dataset(values, [subset], where)]


def _subsets_from_tables(tables: list[dict], values: dict[str, Any], path: Path, place: str) -> list[SubsetConfig]:
    """The `[[datasets.subsets]]` of one dataset; `values` are those that hold unless a subset says otherwise."""
    subsets = []
    for number, table in enumerate(tables, start=1):
        where = f"{place}, {_SUBSET} {number}"
        own = {**values, **_checked(_SUBSET_TABLE, table, where)}
        if "metadata_file" in own:
            _refuse_what_metadata_says(table, where)
            own["metadata_file"] = _existing(own["metadata_file"], path, where, "metadata_file")
            own.setdefault("image_dir", own["metadata_file"].parent)
        if "image_dir" not in own:
            raise UserError(f"{where}: image_dir is missing; write image_dir = 'path/of/the/pictures'")
        for key in ("image_dir", "conditioning_data_dir"):
            if key in own:
                own[key] = _existing(own[key], path, where, key)
        subsets.append(_subset(own, where))
        if "metadata_file" not in own:
            check_pictures(subsets[-1].image_dir, subsets[-1].caption_extension, where)
    _refuse_twins(subsets, place)
    return subsets


def _list_of_tables(table: dict[str, Any], key: str, brackets: str, place: str) -> list[dict[str, Any]]:
    tables = table.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(entry, dict) for entry in tables):
        raise UserError(f"{place}: {key} must be a list of tables; write {brackets} with double brackets")
    if not tables:
        raise UserError(f"{place}: there is no {brackets}; add one")
    return tables


def _checked(model: type[BaseModel], table: dict[str, Any], place: str) -> dict[str, Any]:
    """The values of one table that are set, checked. Raises UserError for a wrong key or value."""
    _refuse_wrong_keys(table, model.model_fields, place)
    try:
        return model(**table).model_dump(exclude_none=True)
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        shown = json.dumps(table[key], ensure_ascii=False, default=str)
        raise UserError(f"{place}: {key} = {shown}: expected {describe_problem(problem)}") from error


def _refuse_mixture(tables: list[dict], place: str) -> None:
    """Pictures of a metadata file and those of a folder come from different worlds."""
    with_file = [number for number, table in enumerate(tables, start=1) if "metadata_file" in table]
    if 0 < len(with_file) < len(tables):
        raise UserError(f"{place}: {_SUBSET} {with_file[0]} has a metadata_file and others have none; make two {_DATASET} of them")


def _refuse_what_metadata_says(table: dict[str, Any], where: str) -> None:
    for key in NOT_WITH_METADATA:
        if key in table:
            raise UserError(f"{where}: {key} has no place beside metadata_file, which says what the pictures are; take it out")


def _refuse_wrong_keys(table: dict[str, Any], allowed: Collection[str], place: str) -> None:
    for key in [key for key, nothing in HARMLESS.items() if key in table and table[key] == nothing]:
        del table[key]
    for key in table:
        if key not in allowed:
            raise _wrong_key(key, allowed, place)


def _wrong_key(key: str, allowed: Collection[str], place: str) -> UserError:
    if key in REFUSED:
        return UserError(f"{place}: the key '{key}' is not supported: {REFUSED[key]}")
    if key in COMMAND_LINE_ONLY:
        return UserError(f"{place}: '{key}' is no dataset key; give it on the command line as --{key}")
    homes = {**dict.fromkeys(SHARED_KEYS, f"{_GENERAL}, {_DATASET} or {_SUBSET}"), "subsets": f"{_DATASET}, as {_SUBSET}"}
    homes |= {**dict.fromkeys(DATASET_KEYS, f"{_GENERAL} or {_DATASET}"), **dict.fromkeys(SUBSET_ONLY, _SUBSET)}
    if key in homes:
        return UserError(f"{place}: the key '{key}' does not belong here; it belongs in {homes[key]}")
    # A slip of the pen in a key of another level should be recognised as well.
    return unknown("key", key, {*allowed, *homes} - ({"subsets"} - {*allowed}), place)


def _existing(given: Path, path: Path, where: str, key: str) -> Path:
    """The folder or file of a key: relative to the current directory, else to the dataset file."""
    beside, is_file = path.parent / given, key == "metadata_file"
    for candidate in (given, beside):
        if candidate.is_file() if is_file else candidate.is_dir():
            return candidate
        if candidate.exists():
            kind = "is a folder; give the .json file" if is_file else "is a file; give the folder that it lies in"
            raise UserError(f"{where}: {key} = {given} {kind}")
    if any(ord(letter) < 32 for letter in str(given)):
        raise UserError(f"{where}: {key} = {str(given)!r}: \"\\t\" and the like are control characters in TOML; write the "
                        "path in 'single quotes' or with forward slashes")
    looked = str(given) if given.is_absolute() else f"{Path.cwd() / given} or {beside.absolute()}"
    raise UserError(f"{where}: {key} = {given}: there is no {'file' if is_file else 'folder'} {looked}")


def _refuse_twins(subsets: list[SubsetConfig], place: str) -> None:
    seen: dict[str, int] = {}
    for number, subset in enumerate(subsets, start=1):
        key = "metadata_file" if subset.metadata_file else "image_dir"
        real = os.path.normcase(os.path.realpath(getattr(subset, key)))
        if real in seen:
            raise UserError(f"{place}: {_SUBSET} {seen[real]} and {number} have the same {key} {getattr(subset, key)}; raise "
                            f"num_repeats of one instead, or put them in two {_DATASET}")
        seen[real] = number


def _subset(values: dict[str, Any], where: str) -> SubsetConfig:
    return _complete(SubsetConfig, {key: value for key, value in values.items() if key in SubsetConfig.model_fields}, where)


def _dataset(values: dict[str, Any], subsets: list[SubsetConfig], where: str) -> DatasetConfig:
    if all(subset.is_reg for subset in subsets):
        raise UserError(f"{where}: all subsets are regularisation pictures (is_reg); add one with the pictures to learn")
    if "resolution" not in values:
        raise UserError(f"{where}: resolution is missing; give --resolution=512, or write resolution = 512 in the dataset file")
    own = {key: value for key, value in values.items() if key in DatasetConfig.model_fields}
    dataset = _complete(DatasetConfig, {**own, "subsets": tuple(subsets)}, where)
    given, used = (dataset.min_bucket_reso, dataset.max_bucket_reso), dataset.bucket_bounds
    if dataset.enable_bucket and not dataset.bucket_no_upscale and given != used:
        log.warning("%s: min_bucket_reso and max_bucket_reso %d and %d are no multiples of bucket_reso_steps; %d and %d are used",
                    where, *given, *used)
    return dataset


def _complete(model: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    """Single values are checked by now; what may still be wrong is how they go together."""
    try:
        return model(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = f"{problem['loc'][0]} = {problem['input']}: expected " if problem["loc"] else ""  # the repeats in a folder's name
        raise UserError(f"{where}: {key}{describe_problem(problem)}") from error


def _warn_without_effect(table: dict[str, Any], dataset: DatasetConfig, place: str) -> None:
    """Bucket keys written in the file that choose nothing."""
    if not dataset.enable_bucket:
        idle, reason = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"), "without enable_bucket"
    elif dataset.bucket_no_upscale:
        idle, reason = ("min_bucket_reso", "max_bucket_reso"), "with bucket_no_upscale"
    else:
        return
    written = [key for key in idle if key in table]
    if written:
        log.warning("%s: %s no effect %s", place, " and ".join(written) + (" has" if len(written) == 1 else " have"), reason)
