"""Properties of an option or a dataset key besides its name, type, default and help.

They are declared with the option. Metadata, the check of a resumed run, logs, caches and the list of idle options use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from library.errors import UserError

T = TypeVar("T")

RECORDED_ELSEWHERE = "recorded elsewhere"


@dataclass(frozen=True)
class Traits:
    """Properties of one option.

    record: the metadata key that holds its value, or `RECORDED_ELSEWHERE` if other keys hold it in another form. Without
        either, `ss_other_options` records a value that decides what is trained and is not the default.
    resume: a resumed run must have the same value ("alike"), the same file name ("file name"), or any value ("free"). None: the
        option's group decides.
    secret: it is written to no file. path: its value is a path or holds one, and is written to no file that is shared.
    varies: what differs from use to use of an image: the "caption", whether there is one ("dropout"), the "pixels", or whether
        the image is mirrored ("mirror").
    held_out: it also holds for held-out images.
    entry: the metadata has it in the entry of each dataset.
    needs: choices of options; of each choice one must be given, or it has no effect. unless: options with which it has none.
    only_with: an option, and those values of it with which this one has an effect. off: values that ask for nothing, as None
        and 0 do.
    """

    record: str | None = None
    resume: Literal["alike", "file name", "free"] | None = None
    secret: bool = False
    path: bool = False
    varies: Literal["caption", "dropout", "pixels", "mirror"] | None = None
    held_out: bool = False
    entry: bool = False
    needs: tuple[tuple[str, ...], ...] = ()
    unless: tuple[str, ...] = ()
    only_with: tuple[str, tuple[str, ...]] | None = None
    off: tuple[Any, ...] = ()


_TRAITS = frozenset(Traits.__dataclass_fields__)


def option(default: Any = ..., *, help: str | None = None, **properties: Any) -> Any:
    """A field of an option group or a dataset table. properties: arguments of pydantic's Field (`ge=0`), fields of `Traits`.

    needs: one choice may stand alone, as `("a", "b")`.
    """
    if properties.get("needs") and isinstance(properties["needs"][0], str):
        properties["needs"] = (properties["needs"],)
    traits = Traits(**{name: properties.pop(name) for name in list(properties) if name in _TRAITS})
    return Field(default, description=help, json_schema_extra={"traits": traits}, **properties)  # type: ignore[dict-item]


def required(value: T | None, name: str) -> T:
    """The value of a required option. Raises UserError if it was not given."""
    if value is None:
        raise UserError(f"--{name} is missing")
    return value


def traits_of(field: FieldInfo) -> Traits:
    """The traits that were declared with a field."""
    extra = field.json_schema_extra
    traits = extra.get("traits") if isinstance(extra, dict) else None
    return traits if isinstance(traits, Traits) else Traits()


@cache
def fields_with(model: type[BaseModel], **wanted: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of the fields whose trait has one of these values: `fields_with(SubsetConfig, varies=("pixels",))`."""
    ((trait, values),) = wanted.items()
    return tuple(name for name, field in model.model_fields.items() if getattr(traits_of(field), trait) in values)
