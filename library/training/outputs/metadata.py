"""Metadata of a network file: the ss_* keys by which web interfaces and people find out how it was made.

Names and forms are those of sd-scripts. Every value is text, written the way Python prints it (`None`, `True`, `0.0001`).
"""

from __future__ import annotations

import base64
import json
import mimetypes
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from library import __version__
from library.command_line import option_fields
from library.data.config import NOT_WITH_METADATA
from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.facts import DatasetFacts, SubsetFacts
from library.errors import UserError
from library.formats.families import Records
from library.formats.modelspec import MINIMUM, modelspec
from library.key_values import read_pairs
from library.option_traits import fields_with, traits_of
from library.safe_text import as_data, as_unicode
from library.training.network import TrainedNetwork
from library.training.options import NetworkOptions, TrainNetworkOptions
from library.training.outputs.from_metadata import recorded_dataset_keys
from library.training.outputs.trackers import is_private
from library.training.plan import Plan
from library.training.run_state.compatible import decisive_values

IDENTITY = ("ss_session_id", "ss_training_started_at", "modelspec.date")


class RunMetadata:
    """The metadata of one run; `at` gives that of a file saved at a moment of it. model_facts: of the base model."""

    def __init__(self, facts: Mapping[str, Any], model_facts: Future[dict[str, str]], minimum_only: bool) -> None:
        self.facts, self.model_facts, self.minimum_only = dict(facts), model_facts, minimum_only

    def identity(self) -> dict[str, Any]:
        """What stays the same when a run is resumed: its number and when it began."""
        return {key: self.facts[key] for key in IDENTITY}

    def take_identity(self, identity: Mapping[str, Any]) -> None:
        """Continue that run."""
        self.facts |= {key: identity[key] for key in IDENTITY}

    def at(self, step: int, epoch: int) -> dict[str, str]:
        """Metadata for a file saved after `step` optimizer steps; epoch: 1-based at an epoch's end, else epochs finished."""
        facts = {
            **self.facts,
            **self.model_facts.result(),
            "ss_steps": step,
            "ss_epoch": epoch,
            "ss_training_finished_at": time.time(),
        }
        if self.minimum_only:
            facts = {key: value for key, value in facts.items() if key in MINIMUM}
        return {key: as_text(value) for key, value in facts.items()}


def as_text(value: Any) -> str:
    """JSON for dictionaries and lists, else what Python prints; what is no Unicode (in a file's name, say) becomes U+FFFD."""
    return json.dumps(as_data(value)) if isinstance(value, (dict, list)) else as_unicode(str(value))


def run_facts(
    options: TrainNetworkOptions,
    datasets: Sequence[DatasetFacts],
    trained: TrainedNetwork,
    records: Records,
    plan: Plan,
    *,
    seed: int,
    optimizer: str,
) -> dict[str, Any]:
    """Everything about a run that is the same in all its files. optimizer: its full name with its arguments."""
    model, network, rates = options.model, options.network, options.optimizer
    facts = recorded(options, "ss_") | {
        "ss_session_id": secrets.randbelow(2**32),
        "ss_training_started_at": time.time(),
        "ss_num_train_images": sum(d.num_train_images for d in datasets),
        "ss_num_reg_images": sum(d.num_reg_images for d in datasets),
        "ss_num_validation_images": sum(d.num_validation_images for d in datasets),
        "ss_num_batches_per_epoch": plan.micro_batches_per_epoch,
        "ss_num_epochs": plan.epochs,
        "ss_max_train_steps": plan.max_steps,
        "ss_lr_scheduler": rates.lr_scheduler_type or rates.lr_scheduler,
        **network_facts(network, trained),
        "ss_base_model_version": records.base_model_version[model.prediction],
        "ss_cache_latents": options.augmentation.caches_latents,
        "ss_seed": seed,
        "ss_optimizer": optimizer,
        "ss_sd_scripts_commit_hash": commit_hash(),
    }
    if network.network_args:
        facts["ss_network_args"] = read_pairs(network.network_args, "--network_args")
    other = other_options(options)
    if other:
        facts["ss_other_options"] = other
    has_dataset_file = bool(options.data.dataset_config)
    return facts | data_facts(datasets, plan, has_dataset_file) | model_spec(options, datasets, records)


def recorded(options: BaseModel, prefix: str) -> dict[str, Any]:
    """The options that the metadata have as they were given, by key; the keys begin with `prefix`."""
    keys = {name: traits_of(field).record or "" for name, field in option_fields(type(options)).items()}
    values = {name: getattr(group, name) for _, group in options for name in type(group).model_fields}
    return {key: values[name] for name, key in keys.items() if key.startswith(prefix)}


def other_options(options: BaseModel) -> dict[str, Any]:
    """What else was given and decides what the file holds, for --from_metadata.

    A key of ours, since sd-scripts has none for these. Paths and secrets are left out.
    """
    fields = option_fields(type(options))
    return {
        name: value for name, value in decisive_values(options).items()
        if value != fields[name].get_default() and not traits_of(fields[name]).record and not is_private(fields[name], value)
    }  # fmt: skip


def network_facts(options: NetworkOptions, trained: TrainedNetwork) -> dict[str, Any]:
    """Rank and alpha: those asked for, or with --dim_from_weights those of the file."""
    rank = 4 if options.network_dim is None else options.network_dim
    dim, alpha = trained.rank_and_alpha if options.dim_from_weights else (rank, options.network_alpha)
    return {"ss_network_dim": dim, "ss_network_alpha": alpha}


def model_spec(options: TrainNetworkOptions, datasets: Sequence[DatasetFacts], records: Records) -> dict[str, str]:
    """The modelspec.* keys (Stability AI's model metadata standard 1.0.1), which web interfaces show."""
    model = options.model
    sizes = [dataset.config.resolution for dataset in datasets]
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    keys = {
        "architecture": records.architecture[model.prediction] + "/lora",
        "implementation": records.implementation,
        "implementation_version": f"sd-lora-suite/{__version__}",
        "title": options.metadata.metadata_title or options.output.output_name or f"LoRA@{time.time():.0f}",
        "resolution": f"{width}x{height}",
        "prediction_type": model.prediction,
    }
    if model.clip_skip:
        keys["encoder_layer"] = str(model.clip_skip)
    if options.metadata.metadata_thumbnail:
        keys["thumbnail"] = as_data_url(options.metadata.metadata_thumbnail)
    return modelspec(keys) | {key: value for key, value in recorded(options, "modelspec.").items() if value}


def as_data_url(image: str) -> str:
    """An image file as text that holds the image itself; such a text stays. Raises UserError if there is no such image."""
    if image.startswith("data:"):
        return image
    kind = mimetypes.guess_type(image)[0] or ""
    if not Path(image).is_file() or not kind.startswith("image/"):
        raise UserError(f"--metadata_thumbnail {image}: there is no such image file; give a .png, .jpg or .webp file")
    return f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode('ascii')}"


def commit_hash() -> str:
    """The git commit of this suite, or `(unknown)` outside a checkout."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "(unknown)"
    return result.stdout.strip() if result.returncode == 0 else "(unknown)"


def data_facts(datasets: Sequence[DatasetFacts], plan: Plan, has_dataset_file: bool) -> dict[str, Any]:
    """Images, buckets and tags. With a dataset file every dataset has an entry of its own, else the keys stand alone."""
    folders: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    tags: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for subset in dataset.subsets:
            name = _free_name(subset.folder, folders[subset.config.is_reg])
            folders[subset.config.is_reg][name] = {"n_repeats": subset.config.num_repeats, "img_count": subset.img_count}
        for folder, counts in dataset.tag_frequency.items():
            tags.setdefault(folder, counts)
    facts: dict[str, Any] = {"ss_dataset_dirs": folders[False], "ss_tag_frequency": tags}
    if has_dataset_file:
        return facts | {
            "ss_datasets": [_dataset_entry(dataset) for dataset in datasets],
            "ss_other_dataset_keys": other_dataset_keys(datasets),
        }
    config, first = datasets[0].config, datasets[0].subsets[0].config
    return facts | {
        "ss_reg_dataset_dirs": folders[True],
        **{key: getattr(config, name) for key, name in recorded_dataset_keys(DatasetConfig).items()},
        **{key: getattr(first, name) for key, name in recorded_dataset_keys(SubsetConfig).items()},
        "ss_total_batch_size": config.batch_size * plan.batches_per_step,
        "ss_resolution": config.resolution,
        "ss_bucket_info": json.dumps(datasets[0].bucket_info),
    }


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    """A folder's name; a second one of that name becomes `name (2)`, and so on."""
    numbered = (name if count == 1 else f"{name} ({count})" for count in range(1, len(taken) + 2))
    return next(candidate for candidate in numbered if candidate not in taken)


def _dataset_entry(dataset: DatasetFacts) -> dict[str, Any]:
    config = dataset.config
    return {
        "is_dreambooth": not any(subset.config.metadata_file for subset in dataset.subsets),
        "batch_size_per_device": config.batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": list(config.resolution),
        "enable_bucket": config.enable_bucket,
        "min_bucket_reso": config.min_bucket_reso,
        "max_bucket_reso": config.max_bucket_reso,
        "tag_frequency": dataset.tag_frequency,
        "bucket_info": dataset.bucket_info,
        "resize_interpolation": config.resize_interpolation,
        "subsets": [_subset_entry(subset) for subset in dataset.subsets],
    }


def other_dataset_keys(datasets: Sequence[DatasetFacts]) -> list[dict[str, Any]]:
    """What else the dataset file says, for --from_metadata: a key of ours, as above. Of folders the name alone."""

    def other(config: BaseModel, recorded: Mapping[str, Any]) -> dict[str, Any]:
        given = {key for key, field in type(config).model_fields.items() if getattr(config, key) != field.get_default()}
        without = NOT_WITH_METADATA if "metadata_file" in recorded else ()
        values = config.model_dump(mode="json", include=given - {*recorded, *without, "subsets", "batch_size"})
        paths = set(fields_with(type(config), path=(True,)))
        return {key: Path(value).name if key in paths else value for key, value in values.items()}

    return [
        other(dataset.config, _dataset_entry(dataset))
        | {"subsets": [other(subset.config, _subset_entry(subset)) for subset in dataset.subsets]}
        for dataset in datasets
    ]


def _subset_entry(subset: SubsetFacts) -> dict[str, Any]:
    keys = fields_with(SubsetConfig, entry=(True,))
    config = subset.config
    entry = {"img_count": subset.img_count, "image_dir": config.image_dir.name, **{key: getattr(config, key) for key in keys}}
    if config.metadata_file:
        return entry | {"metadata_file": config.metadata_file.name}
    return entry | {"class_tokens": config.class_tokens, "is_reg": config.is_reg}
