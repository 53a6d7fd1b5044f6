"""What is to be known of an option or a dataset key besides its name, type, default and help.

It is declared with the option. Metadata, the check of a resumed run, logs, caches and the list of idle options are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from library.errors import UserError

T = TypeVar("T")

IN_OTHER_WORDS = "in other words"


@dataclass(frozen=True)
class Traits:
    """Properties of one option.

    record: the key of a file's metadata that holds its value, or `IN_OTHER_WORDS` if several keys say it together. Without one,
        a value that decides what is trained and is not the default goes to `ss_other_options`.
    resume: a resumed run needs it "alike", the "file name" alone alike, or it is "free". None: as its group says.
    secret: it is written nowhere. path: it names a file or folder, or stands on one, and is written into no file for others.
    varies: what it makes different from use to use: the "caption", whether there is one ("dropout"), the "pixels", or whether
        an image is mirrored ("mirror").
    held_out: images that are validated with keep it.
    entry: a dataset's entry in the metadata holds it.
    needs: options of which one must be given, or it has no effect. unless: an option that overrules it.
    only_with: an option and the values of it with which it has an effect.
    """

    record: str | None = None
    resume: Literal["alike", "file name", "free"] | None = None
    secret: bool = False
    path: bool = False
    varies: Literal["caption", "dropout", "pixels", "mirror"] | None = None
    held_out: bool = False
    entry: bool = False
    needs: tuple[str, ...] = ()
    unless: str | None = None
    only_with: tuple[str, tuple[str, ...]] | None = None


_TRAITS = frozenset(Traits.__dataclass_fields__)


def option(default: Any = ..., *, help: str | None = None, **words: Any) -> Any:
    """A field of an option group or a dataset table: pydantic's checks (`ge=0`) and properties of `Traits` by their names."""
    traits = Traits(**{name: words.pop(name) for name in list(words) if name in _TRAITS})
    return Field(default, description=help, json_schema_extra={"traits": traits}, **words)  # type: ignore[dict-item]


def required(value: T | None, name: str) -> T:
    """The value of an option that a run cannot do without. Raises UserError if it was not given."""
    if value is None:
        raise UserError(f"--{name} is missing")
    return value


def traits_of(field: FieldInfo) -> Traits:
    """What was declared with a field."""
    extra = field.json_schema_extra
    traits = extra.get("traits") if isinstance(extra, dict) else None
    return traits if isinstance(traits, Traits) else Traits()


@cache
def fields_with(model: type[BaseModel], **wanted: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of the fields that have one of the wanted values of a property: `fields_with(SubsetConfig, varies=("pixels",))`."""
    ((trait, values),) = wanted.items()
    return tuple(name for name, field in model.model_fields.items() if getattr(traits_of(field), trait) in values)
