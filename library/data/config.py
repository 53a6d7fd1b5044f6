"""From a dataset file, folders or a metadata file to complete datasets: which keys are allowed where, and which values hold.

A value comes from the first of these that has one: subset, dataset, [general], command line, default. In the functions here,
`where` is the file and table (or the option) that an error message names.
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
from library.data.folders import check_images, image_subsets, warn_of_inner_images
from library.errors import Problems, UserError, UserErrors, unknown
from library.files import as_on_disk

log = logging.getLogger(__name__)

# Keys of sd-scripts that are errors here, with the reason, unless they have their value of HARMLESS.
UNSUPPORTED = {
    "custom_attributes": "prior preservation is done with is_reg images here; take it out",
    "network_multiplier": "sd-scripts takes it and does nothing with it; take it out",
    "cache_info": "sizes are read from image headers at every start, which is fast, and captions anew; take it out",
}
HARMLESS = {"custom_attributes": {}, "network_multiplier": 1.0, "cache_info": False}
# Keys by which a file of training options is recognised.
TRAINING_KEYS = {"pretrained_model_name_or_path", "network_module", "output_dir", "train_data_dir", "learning_rate"}
# Keys that a subset with a metadata_file must not have: the file takes their place.
NOT_WITH_METADATA = ("is_reg", "class_tokens", "caption_extension")
COMMAND_LINE_ONLY = ("prior_loss_weight", "max_token_length", "debug_dataset")

_DATASET_TABLE = optional_keys("DatasetTable", DATASET_KEYS + SHARED_KEYS)
_SUBSET_TABLE = optional_keys("SubsetTable", SUBSET_ONLY + SHARED_KEYS)
_GENERAL, _DATASET, _SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"


def datasets_from_file(path: Path, defaults: DatasetDefaults) -> list[DatasetConfig]:
    """Read `--dataset_config`. Raises UserErrors with everything that is wrong in it, naming file, table and key."""
    path = Path(path)
    tables = read_config_file(path)
    if "datasets" not in tables and {**tables, **_keys_of_tables(tables)}.keys() & TRAINING_KEYS:
        raise UserError(f"--dataset_config {path} holds options of the training; give it as --config_file={path}")
    problems = Problems()
    problems.of(_reject_wrong_keys, tables, ("general", "datasets"), f"{path}, top level")
    general = tables.get("general", {})
    if not isinstance(general, dict):
        raise UserError(f"{path}: write {_GENERAL} once, with single brackets")
    shared = problems.of(_checked, _DATASET_TABLE, general, f"{path}, {_GENERAL}")
    entries = problems.of(_list_of_tables, tables, "datasets", _DATASET, str(path)) or []
    datasets = problems.results(
        problems.of(_dataset_from_table, table, shared, defaults, path, f"{path}, {_DATASET} {number}")
        for number, table in enumerate(entries, start=1)
    )
    _warn_of_inner_images(datasets)
    return datasets


def _warn_of_inner_images(datasets: list[DatasetConfig], more_used: Collection[Path] = ()) -> None:
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    used = [folder for subset in subsets for folder in (subset.image_dir, subset.conditioning_data_dir) if folder]
    warn_of_inner_images((s.image_dir for s in subsets if s.metadata_file is None), [*used, *more_used])


def _keys_of_tables(tables: dict[str, Any]) -> dict[str, Any]:
    return {key: value for table in tables.values() if isinstance(table, dict) for key, value in table.items()}


def _dataset_from_table(
    table: dict[str, Any], general: dict[str, Any] | None, defaults: DatasetDefaults, path: Path, where: str
) -> DatasetConfig:
    """One of `[[datasets]]`. Raises UserErrors with everything that is wrong in it. `general` is None if that table is wrong."""
    problems = Problems()
    problems.of(_reject_wrong_keys, table, ("subsets", *_DATASET_TABLE.model_fields), where)
    own = {key: value for key, value in table.items() if key != "subsets" and key in _DATASET_TABLE.model_fields}
    checked = problems.of(_checked, _DATASET_TABLE, own, where)
    in_file = {**(general or {}), **(checked or {})}
    values = {**defaults.model_dump(exclude_none=True), **in_file}
    subset_tables = problems.of(_list_of_tables, table, "subsets", _SUBSET, where) or []
    problems.of(_reject_mixed_sources, subset_tables, where)
    subsets = problems.of(_subsets_from_tables, subset_tables, values, path, where) or []
    if None not in (general, checked):  # else the resolution may be missing because its table is wrong
        problems.of(_require_resolution, values, where)
    problems.raise_found()
    dataset = _dataset(values, subsets, where)
    _warn_without_effect(in_file, dataset, where)
    return dataset


def datasets_from_folders(
    train_data_dir: Path, reg_data_dir: Path | None, defaults: DatasetDefaults, masks: Path | None = None
) -> list[DatasetConfig]:
    """One dataset from `--train_data_dir` and `--reg_data_dir`; for the folders that are used see `folders.image_subsets`.

    `masks` (`--conditioning_data_dir`) has the same folders as `train_data_dir`, with the masks of the images.
    """
    values = defaults.model_dump(exclude_none=True)
    where, subsets, problems = f"--train_data_dir={train_data_dir}", [], Problems()
    for option, parent, is_reg in (("--train_data_dir", train_data_dir, False), ("--reg_data_dir", reg_data_dir, True)):
        if parent is None:
            continue
        for found in problems.of(image_subsets, parent, option) or ():
            mask_dir = masks / found.image_dir.relative_to(as_on_disk(parent)) if masks and not is_reg else None
            mask_dir = mask_dir and as_on_disk(mask_dir)
            own = {"num_repeats": found.num_repeats, "class_tokens": found.class_tokens, "conditioning_data_dir": mask_dir}
            own = {key: value for key, value in own.items() if value is not None}
            if mask_dir and not mask_dir.is_dir():
                problems.found.append(f"--conditioning_data_dir={masks}: there is no folder {mask_dir} for {found.image_dir}")
            subsets.append(problems.of(_subset_of_folder, {**values, **own, "is_reg": is_reg}, found.image_dir, option))
    problems.of(_require_resolution, values, where)
    dataset = _dataset(values, problems.results(subsets), where)
    parents = [folder for folder in (train_data_dir, reg_data_dir, masks) if folder]
    # `image_subsets` has warned of unused images in subfolders of the parent folders.
    inner = [subset for subset in dataset.subsets if os.path.abspath(subset.image_dir) not in map(os.path.abspath, parents)]
    _warn_of_inner_images([dataset.model_copy(update={"subsets": tuple(inner)})], parents)
    return [dataset]


def _subset_of_folder(values: dict[str, Any], image_dir: Path, option: str) -> SubsetConfig:
    subset = _subset({**values, "image_dir": image_dir}, str(image_dir))
    check_images(subset.image_dir, subset.caption_extension, option)
    return subset


def datasets_from_metadata(in_json: Path, image_dir: Path | None, defaults: DatasetDefaults) -> list[DatasetConfig]:
    """One dataset from `--in_json`. Its images are in `--train_data_dir`, else where the file says or beside it."""
    where, problems = f"--in_json={in_json}", Problems()
    in_json, image_dir = as_on_disk(Path(in_json)), image_dir and as_on_disk(image_dir)
    if not in_json.is_file():
        problems.found.append(f"{where}: no such file; looked in {Path.cwd()}")
    if image_dir is not None and not Path(image_dir).is_dir():
        problems.found.append(f"--train_data_dir={image_dir}: no such folder; looked in {Path.cwd()}")
    values = defaults.model_dump(exclude_none=True)
    problems.of(_require_resolution, values, where)
    problems.raise_found()
    subset = _subset({**values, "metadata_file": in_json, "image_dir": image_dir or Path(in_json).parent}, where)
    return [_dataset(values, [subset], where)]


def _subsets_from_tables(tables: list[dict], values: dict[str, Any], path: Path, where: str) -> list[SubsetConfig]:
    """The `[[datasets.subsets]]` of one dataset; `values` hold for all keys that a subset does not have."""
    problems = Problems()
    subsets = problems.results(
        problems.of(_subset_from_table, table, values, path, f"{where}, {_SUBSET} {number}")
        for number, table in enumerate(tables, start=1)
    )
    _reject_duplicates(subsets, where)
    return subsets


def _subset_from_table(table: dict[str, Any], values: dict[str, Any], path: Path, where: str) -> SubsetConfig:
    """One of `[[datasets.subsets]]`. Raises UserErrors with everything that is wrong in it."""
    problems = Problems()
    own = {**values, **_checked(_SUBSET_TABLE, table, where)}
    if "metadata_file" in own:
        problems.of(_reject_keys_beside_metadata, table, where)
        own["metadata_file"] = problems.of(_existing_path, own["metadata_file"], path, where, "metadata_file")
        own.setdefault("image_dir", (own["metadata_file"] or path).parent)
    if "image_dir" not in own:
        problems.found.append(f"{where}: image_dir is missing; write image_dir = 'path/of/the/images'")
    for key in ("image_dir", "conditioning_data_dir"):
        if key in own:
            own[key] = problems.of(_existing_path, own[key], path, where, key)
    problems.raise_found()
    subset = _subset(own, where)
    if subset.metadata_file is None:
        check_images(subset.image_dir, subset.caption_extension, where)
    return subset


def _list_of_tables(table: dict[str, Any], key: str, brackets: str, where: str) -> list[dict[str, Any]]:
    tables = table.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(entry, dict) for entry in tables):
        raise UserError(f"{where}: {key} must be a list of tables; write {brackets} with double brackets")
    if not tables:
        raise UserError(f"{where}: there is no {brackets}; add one")
    return tables


def _checked(model: type[BaseModel], table: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of one table, checked. Raises UserErrors for wrong keys or values."""
    _reject_wrong_keys(table, model.model_fields, where)
    try:
        return model(**table).model_dump(exclude_none=True)
    except ValidationError as error:
        raise UserErrors([_wrong_value(table, problem, where) for problem in error.errors()]) from error


def _wrong_value(table: dict[str, Any], problem: Any, where: str) -> str:
    key = str(problem["loc"][0])
    shown = json.dumps(table[key], ensure_ascii=False, default=str)
    return f"{where}: {key} = {shown}: expected {describe_problem(problem)}"


def _reject_mixed_sources(tables: list[dict], where: str) -> None:
    """Raises UserError if only some subsets of a dataset have a metadata_file."""
    with_file = [number for number, table in enumerate(tables, start=1) if "metadata_file" in table]
    if 0 < len(with_file) < len(tables):
        raise UserError(
            f"{where}: {_SUBSET} {with_file[0]} has a metadata_file and others have none; make two {_DATASET} of them"
        )


def _reject_keys_beside_metadata(table: dict[str, Any], where: str) -> None:
    keys = [key for key in NOT_WITH_METADATA if key in table]
    if keys:
        raise UserErrors(
            [f"{where}: {key} has no place beside metadata_file, which says what the images are; take it out" for key in keys]
        )


def _reject_wrong_keys(table: dict[str, Any], allowed: Collection[str], where: str) -> None:
    for key in [key for key, nothing in HARMLESS.items() if key in table and table[key] == nothing]:
        del table[key]
    wrong = [str(_wrong_key(key, allowed, where)) for key in table if key not in allowed]
    if wrong:
        raise UserErrors(wrong)


def _wrong_key(key: str, allowed: Collection[str], where: str) -> UserError:
    if key in UNSUPPORTED:
        return UserError(f"{where}: the key '{key}' is not supported: {UNSUPPORTED[key]}")
    if key in COMMAND_LINE_ONLY:
        return UserError(f"{where}: '{key}' is no dataset key; give it on the command line as --{key}")
    homes = {**dict.fromkeys(SHARED_KEYS, f"{_GENERAL}, {_DATASET} or {_SUBSET}"), "subsets": f"{_DATASET}, as {_SUBSET}"}
    homes |= {**dict.fromkeys(DATASET_KEYS, f"{_GENERAL} or {_DATASET}"), **dict.fromkeys(SUBSET_ONLY, _SUBSET)}
    if key in homes:
        return UserError(f"{where}: the key '{key}' does not belong here; it belongs in {homes[key]}")
    # Suggest keys of the other levels too.
    return unknown("key", key, {*allowed, *homes} - ({"subsets"} - {*allowed}), where)


def _existing_path(given: Path, path: Path, where: str, key: str) -> Path:
    """The existing folder or file that a key names: relative to the current folder, else to the dataset file."""
    beside, is_file = path.parent / given, key == "metadata_file"
    for candidate in (as_on_disk(given), as_on_disk(beside)):
        if candidate.is_file() if is_file else candidate.is_dir():
            return candidate
        if candidate.exists():
            kind = "is a folder; give the .json file" if is_file else "is a file; give the folder that it lies in"
            raise UserError(f"{where}: {key} = {given} {kind}")
    if any(ord(letter) < 32 for letter in str(given)):
        raise UserError(
            f'{where}: {key} = {str(given)!r}: "\\t" and the like are control characters in TOML; write the '
            "path in 'single quotes' or with forward slashes"
        )
    looked = str(given) if given.is_absolute() else f"{Path.cwd() / given} or {beside.absolute()}"
    raise UserError(f"{where}: {key} = {given}: there is no {'file' if is_file else 'folder'} {looked}")


def _reject_duplicates(subsets: list[SubsetConfig], where: str) -> None:
    seen: dict[str, int] = {}
    for number, subset in enumerate(subsets, start=1):
        key = "metadata_file" if subset.metadata_file else "image_dir"
        real = os.path.normcase(os.path.realpath(getattr(subset, key)))
        if real in seen:
            raise UserError(
                f"{where}: {_SUBSET} {seen[real]} and {number} have the same {key} {getattr(subset, key)}; raise "
                f"num_repeats of one instead, or put them in two {_DATASET}"
            )
        seen[real] = number


def _subset(values: dict[str, Any], where: str) -> SubsetConfig:
    return _validated(SubsetConfig, {key: value for key, value in values.items() if key in SubsetConfig.model_fields}, where)


def _require_resolution(values: dict[str, Any], where: str) -> None:
    if "resolution" not in values:
        raise UserError(f"{where}: resolution is missing; give --resolution=512, or write resolution = 512 in the dataset file")


def _dataset(values: dict[str, Any], subsets: list[SubsetConfig], where: str) -> DatasetConfig:
    if all(subset.is_reg for subset in subsets):
        raise UserError(f"{where}: all subsets are regularisation images (is_reg); add one with the images to learn")
    own = {key: value for key, value in values.items() if key in DatasetConfig.model_fields}
    dataset = _validated(DatasetConfig, {**own, "subsets": tuple(subsets)}, where)
    given, used = (dataset.min_bucket_reso, dataset.max_bucket_reso), dataset.bucket_bounds
    if dataset.enable_bucket and not dataset.bucket_no_upscale and given != used:
        log.warning(
            "%s: min_bucket_reso and max_bucket_reso %d and %d are no multiples of bucket_reso_steps; %d and %d are used",
            where,
            *given,
            *used,
        )
    return dataset


def _validated(model: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    """A model of these values. Each value was checked before, so an error here is about their combination."""
    try:
        return model(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = f"{problem['loc'][0]} = {problem['input']}: expected " if problem["loc"] else ""  # such as a folder's repeats
        raise UserError(f"{where}: {key}{describe_problem(problem)}") from error


def _warn_without_effect(table: dict[str, Any], dataset: DatasetConfig, where: str) -> None:
    """Warn about bucket keys of the file that have no effect."""
    idle = ["min_bucket_reso", "max_bucket_reso"]
    if not dataset.enable_bucket:
        idle, reason = [*idle, "bucket_reso_steps", "bucket_no_upscale"], "without enable_bucket"
    elif dataset.bucket_no_upscale:
        reason = "with bucket_no_upscale"
    else:
        return
    written = [key for key in idle if key in table]
    if written:
        log.warning("%s: %s no effect %s", where, " and ".join(written) + (" has" if len(written) == 1 else " have"), reason)
