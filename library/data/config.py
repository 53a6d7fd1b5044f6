"""What to train on: the datasets and their subsets, as a dataset file, folders and the command line give them.

The keys, their meaning and their levels are the ecosystem's (docs/train_README.md lists them). A value is taken from the
first place that has one: subset, dataset, [general], command line, default. After that nothing is open: the classes here are
frozen, checked and complete.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator

from library.data.config_file import NOT_BUILT, ONLY_COMMAND_LINE, describe_problem, read_config_file
from library.data.folders import check_pictures, picture_subsets
from library.errors import UserError, unknown

log = logging.getLogger(__name__)


def _pair(kind: type, text_example: str, value: Any) -> Any:
    """Lists become tuples; "640,448", as the command line gives it, is left to `parse_pair`."""
    if isinstance(value, str):
        raise ValueError(f"{text_example}, without quotes")
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, kind)) for n in numbers):
        raise ValueError(text_example)
    return tuple(kind(n) for n in numbers)


def _resolution(value: Any) -> Any:
    square = isinstance(value, int) and not isinstance(value, bool)
    width, height = _pair(int, "512 or [640, 448] (width, height)", [value, value] if square else value)
    if min(width, height) < 8:
        raise ValueError("sides of at least 8 pixels")
    return width, height


def _face_range(value: Any) -> Any:
    if value is None:
        return None
    low, high = _pair(float, "two numbers such as [2.0, 4.0]", value)
    if not 0 < low <= high:
        raise ValueError("two numbers above 0, the smaller one first, such as [2.0, 4.0]")
    return low, high


def _path(value: Any) -> Any:
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise ValueError("the path of a folder in quotes")
    return Path(value).expanduser()


def _extension(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip(". "):
        raise ValueError('a suffix such as ".txt"')
    return value if value.startswith(".") else f".{value}"


def _multiple_of_8(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value < 8 or value % 8:
        raise ValueError("a multiple of 8, usually 64")
    return value


Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    # strict: "3" is no number and true is not 1; a whole number is accepted where a fraction may stand.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SubsetConfig(_Frozen):
    """One folder of pictures and how they are used. Field names are the keys of `[[datasets.subsets]]`."""

    image_dir: Annotated[Path, BeforeValidator(_path)]
    is_reg: bool = False
    class_tokens: Optional[str] = None
    caption_extension: Annotated[str, BeforeValidator(_extension)] = ".caption"
    num_repeats: Positive = 1
    shuffle_caption: bool = False
    keep_tokens: NotNegative = 0
    caption_separator: Annotated[str, Field(min_length=1)] = ","
    keep_tokens_separator: str = ""
    secondary_separator: Optional[str] = None
    enable_wildcard: bool = False
    caption_prefix: Optional[str] = None
    caption_suffix: Optional[str] = None
    caption_dropout_rate: Share = 0.0
    caption_dropout_every_n_epochs: NotNegative = 0
    caption_tag_dropout_rate: Share = 0.0
    token_warmup_min: NotNegative = 1
    token_warmup_step: Annotated[float, Field(ge=0)] = 0.0
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: Annotated[Optional[tuple[float, float]], BeforeValidator(_face_range)] = None
    resize_interpolation: Optional[Interpolation] = None


class DatasetConfig(_Frozen):
    """One dataset: its subsets share training size and batch size. Field names are the keys of `[[datasets]]`."""

    resolution: Annotated[tuple[int, int], BeforeValidator(_resolution)]
    batch_size: Positive = 1
    enable_bucket: bool = False
    min_bucket_reso: Positive = 256
    max_bucket_reso: Positive = 1024
    bucket_reso_steps: Annotated[int, BeforeValidator(_multiple_of_8)] = 64
    bucket_no_upscale: bool = False
    resize_interpolation: Optional[Interpolation] = None
    subsets: tuple[SubsetConfig, ...]

    @property
    def bucket_bounds(self) -> tuple[int, int]:
        """Smallest and largest bucket side in pixels: min_bucket_reso rounded down and max_bucket_reso up to the step."""
        step = self.bucket_reso_steps
        return max(step, self.min_bucket_reso // step * step), -(-self.max_bucket_reso // step) * step

    @model_validator(mode="after")
    def _check(self) -> DatasetConfig:
        low, high = self.bucket_bounds
        size = "x".join(map(str, self.resolution))
        # With bucket_no_upscale the bounds choose nothing, so they refuse nothing either.
        if self.enable_bucket and not self.bucket_no_upscale:
            if low > high:
                raise ValueError(f"min_bucket_reso {self.min_bucket_reso} is above max_bucket_reso {self.max_bucket_reso}")
            if min(self.resolution) < low:
                raise ValueError(f"resolution {size} is below min_bucket_reso {low}; lower min_bucket_reso")
            if max(self.resolution) > high:
                raise ValueError(f"resolution {size} is above max_bucket_reso {high}; raise max_bucket_reso")
        if self.enable_bucket and any(subset.face_crop_aug_range for subset in self.subsets):
            raise ValueError("face_crop_aug_range works without buckets only; take out enable_bucket or face_crop_aug_range")
        return self


SUBSET_ONLY = ("image_dir", "is_reg")
SHARED_KEYS = tuple(key for key in SubsetConfig.model_fields if key not in SUBSET_ONLY)  # allowed at every level
DATASET_KEYS = tuple(key for key in DatasetConfig.model_fields if key != "subsets" and key not in SHARED_KEYS)


def _all_optional(name: str, keys: tuple[str, ...], base: type[BaseModel] = _Frozen) -> type[BaseModel]:
    """A model with the same keys and checks as above, each of which may be left out (None)."""
    known = {**DatasetConfig.model_fields, **SubsetConfig.model_fields}
    fields = {}
    for key in keys:
        field = known[key]
        kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        fields[key] = (Optional[kind], None)
    return create_model(name, __base__=base, __module__=__name__, **fields)


class _CommandLine(_Frozen):
    @model_validator(mode="before")
    @classmethod
    def _read_pairs(cls, values: Any) -> Any:
        """The command line gives pairs as text: "640,448" and "2.0,4.0"; one number means a square."""
        values = dict(values)
        for key, kind in (("resolution", int), ("face_crop_aug_range", float)):
            if isinstance(values.get(key), str):
                try:
                    numbers = [kind(part) for part in values[key].split(",")]
                except ValueError:
                    continue  # the field's own check says what is expected
                values[key] = numbers[0] if len(numbers) == 1 else sorted(numbers) if kind is float else numbers
        return values


_GENERAL = _all_optional("GeneralTable", DATASET_KEYS + SHARED_KEYS)
_SUBSET = _all_optional("SubsetTable", SUBSET_ONLY + SHARED_KEYS)
# What the command line gave: the same keys as above, None where nothing was given.
# `batch_size` is --train_batch_size, `num_repeats` is --dataset_repeats; pairs may be text as the user typed it.
DatasetDefaults = _all_optional("DatasetDefaults", DATASET_KEYS + SHARED_KEYS, _CommandLine)
