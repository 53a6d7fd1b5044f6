"""Options that were given and change nothing, because of what else was given or not: told once, together, before training.

Front ends write many of these into every config file, so that they are no errors. An option counts as given if it has a value
that asks for something and is not its default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from library.command_line import option_fields
from library.data.config_keys import AS_OPTION_NAMES, DatasetConfig
from library.option_traits import traits_of
from library.processes import launched_world
from library.training.datasets import dataset_defaults
from library.training.options import TrainNetworkOptions

# Names of options, whether they are idle, and why.
Rule = tuple[Iterable[str], Any, str]


def idle_options(options: TrainNetworkOptions, configs: Sequence[DatasetConfig]) -> list[str]:
    """What is given and does nothing, each with the reason: `--log_prefix (needs --logging_dir)`."""
    given = {name: value for _, group in options for name, value in group if is_given(group, name)}
    found: dict[str, str] = {}
    for name, why in declared(options, given):
        found.setdefault(name, f"--{name} ({why})")
    for names, idle, why in [*other_rules(options), *data_rules(options, configs)]:
        for name in names:
            if idle and name in given:
                found.setdefault(name, f"--{name} ({why})")
    for name, text in overruled(options, configs):
        if name in given:
            found.setdefault(name, text)
    return list(found.values())


def is_given(group: BaseModel, name: str) -> bool:
    """Whether an option has a value that asks for something and is not its default."""
    value = getattr(group, name)
    return value not in (None, "", 0, []) and value != type(group).model_fields[name].get_default()


def declared(options: TrainNetworkOptions, given: Collection[str]) -> Iterator[tuple[str, str]]:
    """Options that lack what their declaration says they need, or are overruled, each with the reason."""
    values = {name: value for _, group in options for name, value in group}
    fields = option_fields(type(options))
    for name in given:
        traits = traits_of(fields[name])
        if traits.unless and values[traits.unless]:
            yield name, f"--{traits.unless} wins"
        if traits.needs and not any(values[other] for other in traits.needs):
            yield name, f"needs {one_of(traits.needs)}"
        if traits.only_with and values[traits.only_with[0]] not in traits.only_with[1]:
            yield name, f"for --{traits.only_with[0]}={', '.join(traits.only_with[1])}"


def one_of(names: Sequence[str]) -> str:
    """Options as words: `--a, --b or --c`."""
    words = [f"--{name}" for name in names]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def other_rules(options: TrainNetworkOptions) -> list[Rule]:
    """What is more than one option against another."""
    output, precision = options.output, options.precision
    texts = [name for name in type(options.metadata).model_fields if name.startswith("metadata_")]
    by_epoch = output.save_every_n_epochs or output.save_n_epoch_ratio
    compiles = precision.torch_compile or precision.dynamo_backend == "no"
    return [
        (["save_last_n_epochs_state"], not by_epoch, "needs --save_every_n_epochs"),
        (["save_last_n_steps_state"], not output.save_every_n_steps, "needs --save_every_n_steps"),
        (["initial_epoch"], options.state.initial_step is not None, "--initial_step wins"),
        ([*texts, "training_comment"], options.metadata.no_metadata, "--no_metadata leaves it out"),
        (["dynamo_backend"], not compiles, "needs --torch_compile"),
        (["fp8_base_unet"], precision.fp8_base, "--fp8_base does that too"),
        (["no_half_vae"], options.training.mixed_precision == "no", "with --mixed_precision=no all is float32"),
        (["ddp_timeout"], launched_world() == 1, "there is one process"),
    ]


def data_rules(options: TrainNetworkOptions, configs: Sequence[DatasetConfig]) -> list[Rule]:
    """Options of the data that need something in the datasets, whether it was given there or on the command line."""
    subsets = [subset for config in configs for subset in config.subsets]
    changing = any(s.shuffle_caption or s.caption_tag_dropout_rate or s.token_warmup_step for s in subsets)
    bucketed = [config for config in configs if config.enable_bucket]
    validation = ["validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"]
    return [
        (["prior_loss_weight"], not any(subset.is_reg for subset in subsets), "there are no regularisation images"),
        (
            validation,
            not any(config.validation_split for config in configs),
            "no images are held out: needs --validation_split",
        ),
        (["keep_tokens"], not changing, "needs --shuffle_caption or --caption_tag_dropout_rate"),
        (["token_warmup_min"], not any(subset.token_warmup_step for subset in subsets), "needs --token_warmup_step"),
        (["min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"], not bucketed, "needs --enable_bucket"),
        (
            ["min_bucket_reso", "max_bucket_reso"],
            all(c.bucket_no_upscale for c in bucketed),
            "--bucket_no_upscale leaves sizes to the images",
        ),
    ]


def overruled(options: TrainNetworkOptions, configs: Sequence[DatasetConfig]) -> Iterator[tuple[str, str]]:
    """Options of the data for which every dataset, or every folder's name, says something else."""
    for key, value in dataset_defaults(options).model_dump(exclude_none=True).items():
        name = AS_OPTION_NAMES.get(key, key)
        places = configs if key in DatasetConfig.model_fields else [subset for config in configs for subset in config.subsets]
        if all(getattr(place, key) != value for place in places):
            yield (
                name,
                f"--{name} ({'the names of the folders say' if key == 'num_repeats' else 'the dataset file says'} otherwise)",
            )
