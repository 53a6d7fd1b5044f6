"""Options that were given and change nothing, because of what else was given or not: named once, together, before training.

Front ends write many of these into every config file, so that they are no errors. What an option needs, and what overrules it,
is declared with it (`needs`, `unless`, `only_with`). For a key of datasets their values count, wherever these were given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from library.command_line import option_fields
from library.data.config_keys import AS_OPTION_NAMES, DatasetConfig, SubsetConfig
from library.option_traits import traits_of
from library.processes import launched_world
from library.training.datasets import dataset_defaults
from library.training.options import TrainNetworkOptions

AS_KEYS = {option: key for key, option in AS_OPTION_NAMES.items()}


def idle_options(options: TrainNetworkOptions, configs: Sequence[DatasetConfig]) -> list[str]:
    """What is given and does nothing, each with the reason: `--log_prefix (needs --logging_dir)`."""
    fields = option_fields(type(options))
    given = [name for name, value in values_of(options).items() if is_given(fields[name], value)]
    found: dict[str, str] = {}
    for name, why in [*declared(options, configs, given), *of_this_run(configs), *overruled(options, configs)]:
        if name in given:
            found.setdefault(name, f"--{name} ({why})")
    return list(found.values())


def values_of(options: BaseModel) -> dict[str, Any]:
    """The value of every option by name."""
    return {name: value for _, group in options for name, value in group}


def is_given(field: FieldInfo, value: Any) -> bool:
    """Whether a value asks for something and is not the default."""
    return value not in (None, "", 0, [], *traits_of(field).off) and value != field.get_default()


def declared(options: BaseModel, configs: Sequence[DatasetConfig], given: Collection[str]) -> Iterator[tuple[str, str]]:
    """Options that lack what they need, or are overruled, each with the reason."""
    fields, datasets = option_fields(type(options)), [dict(config) for config in configs]
    subsets = [dict(subset) for config in configs for subset in config.subsets]
    values = values_of(options)
    rows_of_all = [(AS_OPTION_NAMES.get(key, key), value) for row in (*datasets, *subsets) for key, value in row.items()]
    values |= dict(sorted(rows_of_all, key=lambda pair: bool(pair[1])))  # of several values one that asks for something counts
    for name in given:
        key = AS_KEYS.get(name, name)
        table, rows = (DatasetConfig, datasets) if key in DatasetConfig.model_fields else (SubsetConfig, subsets)
        field = table.model_fields.get(key)
        reasons = [why_idle(field, row) for row in rows] if field else [why_idle(fields[name], values)]
        if reasons and all(reasons):
            yield name, str(reasons[0])


def why_idle(field: FieldInfo, values: Mapping[str, Any]) -> str | None:
    """Why an option or key has no effect beside these values, by its declaration; None if it has one."""
    traits = traits_of(field)
    for other in traits.unless:
        if values[other] is not None and values[other] is not False and values[other] != "":
            return f"--{other} wins"
    for choice in traits.needs:
        if not any(values[other] for other in choice):
            return f"needs {one_of(choice)}"
    if traits.only_with and values[traits.only_with[0]] not in traits.only_with[1]:
        return f"for --{traits.only_with[0]}={', '.join(traits.only_with[1])}"
    return None


def one_of(names: Sequence[str]) -> str:
    """Options as a phrase: `--a, --b or --c`."""
    options = [f"--{name}" for name in names]
    return " or ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)


def of_this_run(configs: Sequence[DatasetConfig]) -> Iterator[tuple[str, str]]:
    """What depends on neither an option nor a key: the images and the processes that there are."""
    if not any(subset.is_reg for config in configs for subset in config.subsets):
        yield "prior_loss_weight", "there are no regularisation images"
    if launched_world() == 1:
        yield "ddp_timeout", "there is one process"


def overruled(options: TrainNetworkOptions, configs: Sequence[DatasetConfig]) -> Iterator[tuple[str, str]]:
    """Options of the data for which every dataset, or every folder's name, says something else."""
    for key, value in dataset_defaults(options).model_dump(exclude_none=True).items():
        rows = configs if key in DatasetConfig.model_fields else [subset for config in configs for subset in config.subsets]
        if all(getattr(row, key) != value for row in rows):
            who = "the names of the folders say" if key == "num_repeats" else "the dataset file says"
            yield AS_OPTION_NAMES.get(key, key), f"{who} otherwise"
