"""`--from_metadata`: the command and the dataset file of a LoRA, as far as its metadata have them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from library.command_line import option_fields
from library.data.config_keys import DatasetConfig, SubsetConfig
from library.errors import UserError
from library.files import read_safetensors_metadata
from library.option_traits import RECORDED_ELSEWHERE, traits_of
from library.training.optimization.optimizers import spec_named
from library.training.optimization.schedules import SCHEDULES
from library.training.options import TrainNetworkOptions


def recorded_keys(options_class: type[BaseModel] = TrainNetworkOptions) -> dict[str, str]:
    """Key of the metadata -> option that it holds."""
    records = {traits_of(field).record: name for name, field in option_fields(options_class).items()}
    return {key: name for key, name in records.items() if key and key != RECORDED_ELSEWHERE}


def recorded_dataset_keys(table: type[BaseModel]) -> dict[str, str]:
    """Key of the metadata of a run without a dataset file -> key of a dataset or subset."""
    records = {traits_of(field).record: name for name, field in table.model_fields.items()}
    return {key: name for key, name in records.items() if key}


NO_MODEL = "the model's folder is not recorded"
UNKNOWN = (
    "not recorded, and at their defaults here: what is saved and drawn on the way, loaders' processes, and files and folders "
    "that were given (network_weights, base_weights, masks)"
)


def print_from_metadata(path: str, defaults: Mapping[str, Any]) -> int:
    """Print the command and the dataset file. defaults: those of all options. Raises UserError for a file without metadata."""
    metadata = read_metadata(Path(path))
    data_file = f"{metadata.get('ss_output_name') or 'dataset'}.toml"
    sys.stdout.write(
        "\n".join([*command_lines(metadata, data_file, defaults), "", f"# {data_file}", *dataset_lines(metadata), ""])
    )
    return 0


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a network file made by this trainer or a like one."""
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(f"--from_metadata {path}: there is no such .safetensors file; other formats hold no metadata")
    metadata = read_safetensors_metadata(path)
    if "ss_network_module" not in metadata:
        raise UserError(f"--from_metadata {path}: the file does not say how it was made; it was written without metadata")
    return {key: value for key, value in metadata.items() if value != "None"}


def command_lines(metadata: Mapping[str, str], data_file: str, defaults: Mapping[str, Any]) -> list[str]:
    """The command in one line, and before it comments on what is not known."""
    options = {
        "pretrained_model_name_or_path": metadata.get("ss_sd_model_name", "MODEL"),
        "dataset_config": data_file,
        "output_dir": "out",
    }
    options |= {"vae": metadata["ss_vae_name"]} if "ss_vae_name" in metadata else {}
    options |= recorded_options(metadata, defaults)
    comments = [f"# {UNKNOWN}", *doubts(metadata, options)]
    return [*comments, "accelerate launch --num_cpu_threads_per_process 1 train_network.py " + " ".join(as_arguments(options))]


def recorded_options(
    metadata: Mapping[str, str], defaults: Mapping[str, Any], options_class: type[BaseModel] = TrainNetworkOptions
) -> dict[str, Any]:
    """Options that differ from their default: values, lists of texts, and True for a flag."""
    found: dict[str, Any] = {}
    for key, option in recorded_keys(options_class).items():
        if option in defaults and key in metadata and metadata[key] != str(defaults[option]):
            found[option] = True if metadata[key] == "True" else metadata[key]
    found |= own_schedule(metadata)
    found |= {name: value for name, value in json.loads(metadata.get("ss_other_options", "{}")).items() if name in defaults}
    title = metadata.get("modelspec.title")
    if title and title != metadata.get("ss_output_name"):
        found["metadata_title"] = title
    if metadata.get("ss_base_model_version", "").endswith("_v"):
        found["v_parameterization"] = True
    network_args = json.loads(metadata.get("ss_network_args", "{}"))
    if network_args:
        found["network_args"] = [f"{key}={value}" for key, value in network_args.items() if value is not None]
    return found | optimizer_options(metadata.get("ss_optimizer", ""))


def own_schedule(metadata: Mapping[str, str]) -> dict[str, Any]:
    """A schedule that is no name: a class goes by --lr_scheduler_type; AdaFactor's own needs no option but its first rate."""
    name = metadata.get("ss_lr_scheduler", "constant")
    if name.startswith("adafactor:"):
        return {"lr_scheduler": "constant", "learning_rate": name.partition(":")[2]}
    return {} if name in SCHEDULES else {"lr_scheduler": "constant", "lr_scheduler_type": name}


def optimizer_options(described: str) -> dict[str, Any]:
    """`torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))` as options."""
    name, bracket, rest = described.partition("(")
    if not name:
        return {}
    arguments = split_outside_brackets(rest.removesuffix(")")) if bracket else []
    return {"optimizer_type": name} | ({"optimizer_args": arguments} if arguments else {})


def split_outside_brackets(text: str) -> list[str]:
    """Parts between commas that are in no bracket.

    >>> split_outside_brackets("a=(1, 2),b=3")
    ['a=(1,2)', 'b=3']
    """
    parts, depth = [""], 0
    for letter in text.replace(" ", ""):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def doubts(metadata: Mapping[str, str], options: Mapping[str, Any]) -> list[str]:
    """Comments on what the metadata leave open in this case."""
    lines = [f"# {NO_MODEL}; its SHA-256 is {metadata.get('ss_new_sd_model_hash', 'not recorded either')}"]
    if "modelspec.thumbnail" in metadata:
        lines.append("# --metadata_thumbnail: the image is in the file itself")
    if metadata.get("ss_network_dim") == "Dynamic":
        lines.append("# the ranks of the modules differ: train from a file with --network_weights and --dim_from_weights")
    total, batch = metadata.get("ss_total_batch_size"), metadata.get("ss_batch_size_per_device")
    if total and batch:
        processes = int(total) // int(batch) // int(metadata.get("ss_gradient_accumulation_steps", 1))
        if processes > 1:
            lines.append(
                f"# it was trained in {processes} processes: accelerate launch --multi_gpu --num_processes {processes} ..."
            )
    if spec_named(options.get("optimizer_type", "")).may_set_rates:
        lines.append("# AdaFactor may have set learning rate and schedule itself")
    return lines


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as the arguments of a command line, quoted for a shell."""
    arguments = []
    for name, value in options.items():
        if value is True:
            arguments.append(f"--{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *(shlex.quote(str(word)) for word in value)]
        else:
            arguments.append(shlex.quote(f"--{name}={value}"))
    return arguments


def dataset_lines(metadata: Mapping[str, str]) -> list[str]:
    """The dataset file."""
    lines = ["# of folders and files only their own names are recorded"]
    for dataset in datasets(metadata):
        lines += ["", "[[datasets]]", *(f"{key} = {toml(value)}" for key, value in dataset["keys"].items())]
        for subset in dataset["subsets"]:
            lines += ["", "  [[datasets.subsets]]", *(f"  {key} = {toml(value)}" for key, value in subset.items())]
    return lines


def datasets(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """Keys of each dataset and of its subsets, whether or not a dataset file was used."""
    if "ss_datasets" in metadata:
        entries = json.loads(metadata["ss_datasets"])
        others = json.loads(metadata.get("ss_other_dataset_keys", "[]")) or [{}] * len(entries)
        return [from_entry(entry, dict(other)) for entry, other in zip(entries, others, strict=False)]
    if "ss_dataset_dirs" not in metadata:
        raise UserError("--from_metadata: the file says nothing about its images; it was written with --no_metadata")
    width, height = (int(part) for part in metadata.get("ss_resolution", "(512, 512)").strip("()").split(","))
    keys = {"resolution": [width, height]} | picked(metadata, recorded_dataset_keys(DatasetConfig))
    common = picked(metadata, recorded_dataset_keys(SubsetConfig))
    subsets = []
    for key, is_reg in (("ss_dataset_dirs", False), ("ss_reg_dataset_dirs", True)):
        for folder, facts in json.loads(metadata.get(key, "{}")).items():
            tokens = folder.partition("_")[2] if folder.partition("_")[0].isdecimal() else ""
            subset = {"image_dir": folder, "num_repeats": facts["n_repeats"]} | ({"class_tokens": tokens} if tokens else {})
            subsets.append(subset | ({"is_reg": True} if is_reg else {}) | common)
    return [{"keys": keys, "subsets": subsets}]


def picked(metadata: Mapping[str, str], keys: Mapping[str, str]) -> dict[str, Any]:
    return {name: json.loads(metadata[key].lower()) for key, name in keys.items() if key in metadata}


def from_entry(entry: Mapping[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """One dataset of `ss_datasets`, with what `ss_other_dataset_keys` says of it."""
    wanted = ("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "resize_interpolation")
    keys = {key: entry[key] for key in wanted if entry.get(key) is not None} | {
        "batch_size": entry.get("batch_size_per_device", 1)
    }
    subsets = [
        {key: value for key, value in subset.items() if key != "img_count" and value not in (None, "", False)}
        for subset in entry["subsets"]
    ]
    more = other.pop("subsets", None) or [{}] * len(subsets)
    return {"keys": keys | other, "subsets": [subset | own for subset, own in zip(subsets, more, strict=False)]}


def toml(value: Any) -> str:
    """A value as TOML writes it; JSON does it the same way for these."""
    return json.dumps(value, ensure_ascii=False)
