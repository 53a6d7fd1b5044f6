"""The keys of datasets and subsets: types, checks and defaults.

Keys and meanings are those of sd-scripts; docs/train_README.md explains each. `SubsetConfig` and `DatasetConfig` are complete,
checked and frozen; config.py makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator

from library.errors import UserErrors
from library.option_traits import fields_with, option
from library.text_files import lines_of

# Far beyond any use, so that a typing error cannot overflow or fill the memory.
MAX_COUNT = 1_000_000
MAX_SIDE = 16_384  # pixels


def _pair(kind: type, expected: str, value: Any) -> tuple:
    """Two numbers as a tuple. ValueErrors of this file say what is expected; `describe_problem` makes a sentence of it."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, kind)) for n in numbers):
        raise ValueError(f"{expected}, without quotes" if isinstance(value, str) else expected)
    return tuple(kind(n) for n in numbers)


def _resolution(value: Any) -> Any:
    square = isinstance(value, int) and not isinstance(value, bool)
    width, height = _pair(int, "512 or [640, 448] (width, height)", [value, value] if square else value)
    if not 8 <= min(width, height) <= max(width, height) <= MAX_SIDE:
        raise ValueError(f"sides of 8 to {MAX_SIDE:,} pixels")
    return width, height


def _face_range(value: Any) -> Any:
    if value is None:
        return None
    low, high = _pair(float, "two numbers such as [2.0, 4.0]", value)
    if not 0 < low <= high < float("inf"):
        raise ValueError("two numbers above 0, the smaller one first, such as [2.0, 4.0]")
    return low, high


def _path(value: Any) -> Any:
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise ValueError("a path in quotes")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # of ~somebody
        raise ValueError("a path whose ~ is the folder of a user of this machine") from error


def _path_or_none(value: Any) -> Any:
    return None if value is None else _path(value)


def _extension(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip(". "):
        raise ValueError('a suffix such as ".txt"')
    return value if value.startswith(".") else f".{value}"


def _one_line(value: str | None) -> str | None:
    """Only the first line of a caption counts, so a line end within a prefix would take the caption away."""
    if value and len(lines_of(value)) > 1:
        raise ValueError("a text of one line")
    return value


def _multiple_of_8(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not 8 <= value <= MAX_SIDE or value % 8:
        raise ValueError("a multiple of 8, usually 64")
    return value


Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
NotNegative = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Share = Annotated[float, Field(ge=0, le=1)]
OneLine = Annotated[str | None, AfterValidator(_one_line)]


class _Frozen(BaseModel):
    # strict: "3" is no number and true is not 1; but an integer is valid for a float.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SubsetConfig(_Frozen):
    """One folder of images and how to use them. Field names are the keys of `[[datasets.subsets]]`.

    With a `metadata_file` the images are those that the file lists, below `image_dir`.
    """

    image_dir: Annotated[Path, BeforeValidator(_path)] = option(path=True)
    metadata_file: Annotated[Path | None, BeforeValidator(_path_or_none)] = option(None, path=True)
    conditioning_data_dir: Annotated[Path | None, BeforeValidator(_path_or_none)] = option(None, path=True)
    is_reg: bool = False
    class_tokens: OneLine = None
    caption_extension: Annotated[str, BeforeValidator(_extension)] = ".caption"
    num_repeats: Positive = option(1, entry=True)
    color_aug: bool = option(False, varies="pixels", record="ss_color_aug", entry=True)
    flip_aug: bool = option(False, varies="mirror", record="ss_flip_aug", entry=True)
    random_crop: bool = option(False, varies="pixels", record="ss_random_crop", entry=True)
    shuffle_caption: bool = option(False, varies="caption", record="ss_shuffle_caption", entry=True)
    keep_tokens: NotNegative = option(
        0, record="ss_keep_tokens", entry=True, needs=("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")
    )
    caption_separator: Annotated[str, Field(min_length=1)] = ","
    keep_tokens_separator: str = option("", entry=True)
    secondary_separator: str | None = option(None, entry=True)
    # Held-out images keep it, else braces would stay in their captions. A fixed seed chooses the alternatives.
    enable_wildcard: bool = option(False, varies="caption", held_out=True, entry=True)
    caption_prefix: OneLine = option(None, entry=True)
    caption_suffix: OneLine = option(None, entry=True)
    caption_dropout_rate: Share = option(0.0, varies="dropout")
    caption_dropout_every_n_epochs: NotNegative = option(0, varies="dropout")
    caption_tag_dropout_rate: Share = option(0.0, varies="caption")
    token_warmup_min: NotNegative = option(1, needs=("token_warmup_step",))
    token_warmup_step: Annotated[float, Field(ge=0, allow_inf_nan=False)] = option(0.0, varies="caption")
    alpha_mask: bool = False
    face_crop_aug_range: Annotated[tuple[float, float] | None, BeforeValidator(_face_range)] = option(None, varies="pixels")
    resize_interpolation: Interpolation | None = option(None, entry=True)


def without(subset: SubsetConfig, *varies: str) -> SubsetConfig:
    """A subset's settings; each key that has one of these values of `Traits.varies` gets its default."""
    fields = type(subset).model_fields
    return subset.model_copy(update={key: fields[key].get_default() for key in fields_with(type(subset), varies=varies)})


class DatasetConfig(_Frozen):
    """One dataset: subsets that share resolution and batch size. Field names are the keys of `[[datasets]]`."""

    resolution: Annotated[tuple[int, int], BeforeValidator(_resolution)]
    batch_size: Positive = option(1, record="ss_batch_size_per_device")
    enable_bucket: bool = option(False, record="ss_enable_bucket")
    min_bucket_reso: Side = option(256, record="ss_min_bucket_reso", needs=("enable_bucket",), unless=("bucket_no_upscale",))
    max_bucket_reso: Side = option(1024, record="ss_max_bucket_reso", needs=("enable_bucket",), unless=("bucket_no_upscale",))
    bucket_reso_steps: Annotated[int, BeforeValidator(_multiple_of_8)] = option(64, needs=("enable_bucket",))
    bucket_no_upscale: bool = option(False, record="ss_bucket_no_upscale", needs=("enable_bucket",))
    resize_interpolation: Interpolation | None = None
    validation_split: Annotated[float, Field(ge=0, lt=1)] = 0.0
    validation_seed: int | None = option(None, needs=("validation_split",))
    subsets: tuple[SubsetConfig, ...]

    @property
    def bucket_bounds(self) -> tuple[int, int]:
        """Smallest and largest bucket side in pixels: min_bucket_reso rounded down, max_bucket_reso rounded up to the step."""
        step = self.bucket_reso_steps
        return max(step, self.min_bucket_reso // step * step), -(-self.max_bucket_reso // step) * step

    @model_validator(mode="after")
    def _check(self) -> DatasetConfig:
        low, high = self.bucket_bounds
        size = "x".join(map(str, self.resolution))
        # With bucket_no_upscale the bounds have no effect, so they are not checked.
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


SUBSET_ONLY = ("image_dir", "is_reg", "metadata_file", "conditioning_data_dir")
SHARED_KEYS = tuple(key for key in SubsetConfig.model_fields if key not in SUBSET_ONLY)  # allowed at every level
DATASET_KEYS = tuple(key for key in DatasetConfig.model_fields if key != "subsets" and key not in SHARED_KEYS)


def optional_keys(name: str, keys: tuple[str, ...], base: type[BaseModel] = _Frozen) -> type[BaseModel]:
    """A pydantic model with these keys and their checks; each key is optional (None)."""
    known = {**DatasetConfig.model_fields, **SubsetConfig.model_fields}
    fields: dict[str, Any] = {}
    for key in keys:
        field = known[key]
        kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        fields[key] = (kind | None, None)
    return create_model(name, __base__=base, __module__=__name__, **fields)


# Phrases of the checks above -> how they are written on the command line.
AS_OPTION = {
    "[640, 448] (width, height)": "640,448 (width,height)",
    "[2.0, 4.0]": "2.0,4.0",
    ", without quotes": "",
    " without quotes": "",
}
AS_OPTION_NAMES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}


class _CommandLine(_Frozen):
    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, values: Any, build: Any) -> Any:
        """Read pairs from text ("640,448", "2.0,4.0"). Raises UserErrors that name the options."""
        try:
            return build({key: _pair_from_text(key, value) for key, value in values.items()})
        except ValidationError as error:
            raise UserErrors([_wrong_option(values, problem) for problem in error.errors()]) from error


def _wrong_option(values: dict[str, Any], problem: Any) -> str:
    key = str(problem["loc"][0])
    expected = describe_problem(problem)
    for in_file, here in AS_OPTION.items():
        expected = expected.replace(in_file, here)
    return f"--{AS_OPTION_NAMES.get(key, key)}={values[key]}: expected {expected}"


def _pair_from_text(key: str, value: Any) -> Any:
    kind = {"resolution": int, "face_crop_aug_range": float}.get(key)
    if kind is None or not isinstance(value, str):
        return value
    try:
        numbers = [kind(part) for part in value.split(",")]
    except ValueError:
        return value  # the check of the key raises the error
    return numbers[0] if len(numbers) == 1 else sorted(numbers) if kind is float else numbers


class DatasetDefaults(optional_keys("DatasetDefaults", DATASET_KEYS + SHARED_KEYS, _CommandLine)):  # type: ignore[misc]
    """The values of the command line: the same keys as above, None for those not given. Raises UserErrors for wrong values.

    `batch_size` is --train_batch_size, `num_repeats` is --dataset_repeats; pairs may be text as typed.
    """


def describe_problem(problem: Mapping[str, Any]) -> str:
    """What was expected, from one of pydantic's errors: such as "a whole number"."""
    bound = problem.get("ctx", {})
    kinds = {
        "int_type": "a whole number without quotes",
        "int_from_float": "a whole number",
        "float_type": "a number without quotes",
        "bool_type": "true or false, without quotes",
        "string_type": "text in quotes",
        "string_unicode": "text of letters that are Unicode",
        "string_too_short": "at least one character",
        "greater_than_equal": f"at least {bound.get('ge')}",
        "less_than_equal": f"at most {bound.get('le', 0):,}",
        "less_than": f"below {bound.get('lt')}",
        "literal_error": f"one of {bound.get('expected')}",
        "value_error": str(bound.get("error")),
    }
    return kinds.get(problem["type"], problem["msg"])
