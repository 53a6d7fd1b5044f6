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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from library import __version__
from library.data.config import NOT_WITH_METADATA
from library.data.facts import DatasetFacts, SubsetFacts
from library.errors import UserError
from library.files import legacy_hash_of_file, sha256_of_file
from library.training.compatible import decisive_values
from library.training.from_metadata import KEYS, MODELSPEC_TEXTS
from library.training.network import TrainedNetwork, parse_network_args
from library.training.options import LossOptions, ModelOptions, NetworkOptions, TrainNetworkOptions, all_defaults
from library.training.trackers import is_private

# What loaders need to use a file; all that --no_metadata leaves.
MINIMUM = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_v2", "ss_base_model_version")

IDENTITY = ("ss_session_id", "ss_training_started_at", "modelspec.date")


# Options that decide what a file holds and stand in it in another form.
OTHERWISE_RECORDED = (
    "pretrained_model_name_or_path", "vae", "v_parameterization", "network_args", "optimizer_type", "optimizer_args",
    "use_8bit_adam", "use_lion_optimizer", "max_train_epochs", "lr_scheduler_type", "train_batch_size", "resolution",
    "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale", "dataset_repeats", "flip_aug", "color_aug",
    "random_crop", "shuffle_caption", "keep_tokens", "cache_latents_to_disk", "debug_dataset", "max_data_loader_n_workers",
    "persistent_data_loader_workers",
)  # fmt: skip


class RunMetadata:
    """The metadata of one run; `at` gives that of a file saved at a moment of it."""

    def __init__(self, facts: Mapping[str, Any], model_facts: Callable[[], Mapping[str, Any]], minimum_only: bool) -> None:
        self.facts = dict(facts)
        self.minimum_only = minimum_only
        # Hashing a model of several GB takes seconds, which training need not wait for.
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._model_facts = self._executor.submit(model_facts)

    def identity(self) -> dict[str, Any]:
        """What a run keeps when it is resumed: its number and when it began."""
        return {key: self.facts[key] for key in IDENTITY}

    def take_identity(self, identity: Mapping[str, Any]) -> None:
        """Be that run, going on."""
        self.facts |= {key: identity[key] for key in IDENTITY}

    def at(self, step: int, epoch: int) -> dict[str, str]:
        """Metadata for a file saved after `step` optimizer steps; epoch: 1-based at an epoch's end, else epochs finished."""
        facts = {
            **self.facts,
            **self._model_facts.result(),
            "ss_steps": step,
            "ss_epoch": epoch,
            "ss_training_finished_at": time.time(),
        }
        if self.minimum_only:
            facts = {key: value for key, value in facts.items() if key in MINIMUM}
        return {key: as_text(value) for key, value in facts.items()}


def as_text(value: Any) -> str:
    """JSON for dictionaries and lists, else what Python prints."""
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def run_facts(
    options: TrainNetworkOptions,
    datasets: Sequence[DatasetFacts],
    trained: TrainedNetwork,
    *,
    seed: int,
    optimizer: str,
    batches_per_epoch: int,
    epochs: int,
    max_train_steps: int,
    processes: int,
) -> dict[str, Any]:
    """Everything about a run that is the same in all its files."""
    model, network, training = options.model, options.network, options.training
    rates, captions, cache = options.optimizer, options.captions, options.augmentation
    facts: dict[str, Any] = {
        "ss_session_id": secrets.randbelow(2**32),
        "ss_training_started_at": time.time(),
        "ss_output_name": options.output.output_name,
        "ss_learning_rate": rates.learning_rate,
        "ss_text_encoder_lr": rates.text_encoder_lr,
        "ss_unet_lr": rates.unet_lr,
        "ss_num_train_images": sum(d.num_train_images for d in datasets),
        "ss_num_reg_images": sum(d.num_reg_images for d in datasets),
        "ss_num_validation_images": sum(d.num_validation_images for d in datasets),
        "ss_num_batches_per_epoch": batches_per_epoch,
        "ss_num_epochs": epochs,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_max_train_steps": max_train_steps,
        "ss_lr_warmup_steps": rates.lr_warmup_steps,
        "ss_lr_scheduler": rates.lr_scheduler_type or rates.lr_scheduler,
        "ss_network_module": network.network_module,
        **network_facts(network, trained),
        "ss_network_dropout": network.network_dropout,
        "ss_scale_weight_norms": network.scale_weight_norms,
        "ss_mixed_precision": training.mixed_precision,
        "ss_full_fp16": options.precision.full_fp16,
        "ss_fp8_base": options.precision.fp8_base,
        "ss_fp8_base_unet": options.precision.fp8_base_unet,
        "ss_v2": model.v2,
        "ss_base_model_version": base_model_version(model.v2, model.v_parameterization),
        "ss_clip_skip": model.clip_skip,
        "ss_max_token_length": captions.max_token_length,
        "ss_cache_latents": cache.cache_latents or cache.cache_latents_to_disk,
        "ss_seed": seed,
        "ss_lowram": options.precision.lowram,
        **loss_facts(options.loss),
        "ss_prior_loss_weight": options.data.prior_loss_weight,
        "ss_max_grad_norm": rates.max_grad_norm,
        "ss_optimizer": optimizer,
        "ss_caption_dropout_rate": captions.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": captions.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": captions.caption_tag_dropout_rate,
        "ss_face_crop_aug_range": cache.face_crop_aug_range,
        "ss_training_comment": options.metadata.training_comment,
        "ss_sd_scripts_commit_hash": commit_hash(),
    }
    facts |= {
        f"ss_{name}": getattr(options.validation, name)
        for name in (
            "validation_seed",
            "validation_split",
            "max_validation_steps",
            "validate_every_n_epochs",
            "validate_every_n_steps",
        )
    }
    if network.network_args:
        facts["ss_network_args"] = parse_network_args(network.network_args)
    other = other_options(options)
    if other:
        facts["ss_other_options"] = other
    return facts | data_facts(options, datasets, processes) | model_spec(options, datasets)


def other_options(options: TrainNetworkOptions) -> dict[str, Any]:
    """What else was given and decides what the file holds, for --from_metadata.

    A key of ours, since sd-scripts has none for these. Paths and secrets are left out.
    """
    defaults, known = all_defaults(), {*KEYS.values(), *OTHERWISE_RECORDED}
    return {
        name: value for name, value in decisive_values(options).items()
        if value != defaults[name] and name not in known and not is_private(name, value)
    }  # fmt: skip


def loss_facts(loss: LossOptions) -> dict[str, Any]:
    """Noise and loss, as the command line has them."""
    names = (
        "noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations",
        "multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength", "zero_terminal_snr", "min_snr_gamma",
        "loss_type", "huber_schedule", "huber_c", "huber_scale",
    )  # fmt: skip
    facts = {f"ss_{name}": getattr(loss, name) for name in names}
    return facts | {"ss_debiased_estimation": loss.debiased_estimation_loss}


def network_facts(options: NetworkOptions, trained: TrainedNetwork) -> dict[str, Any]:
    """Rank and alpha: those asked for, or with --dim_from_weights those of the file."""
    rank = 4 if options.network_dim is None else options.network_dim
    dim, alpha = trained.rank_and_alpha if options.dim_from_weights else (rank, options.network_alpha)
    return {"ss_network_dim": dim, "ss_network_alpha": alpha}


def model_spec(options: TrainNetworkOptions, datasets: Sequence[DatasetFacts]) -> dict[str, str]:
    """The modelspec.* keys (Stability AI's model metadata standard 1.0.1), which web interfaces show."""
    model = options.model
    v2_size = "768-v" if model.v_parameterization else "512"
    sizes = [dataset.config.resolution for dataset in datasets]
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    keys = {
        "sai_model_spec": "1.0.1",
        "architecture": (f"stable-diffusion-v2-{v2_size}" if model.v2 else "stable-diffusion-v1") + "/lora",
        "implementation": "diffusers",
        "implementation_version": f"sd-lora-suite/{__version__}",
        "title": options.metadata.metadata_title or options.output.output_name or f"LoRA@{time.time():.0f}",
        "resolution": f"{width}x{height}",
        "date": datetime.now().isoformat(timespec="seconds"),
        "prediction_type": "v" if model.v_parameterization else "epsilon",
    }
    if model.clip_skip:
        keys["encoder_layer"] = str(model.clip_skip)
    if options.metadata.metadata_thumbnail:
        keys["thumbnail"] = as_data_url(options.metadata.metadata_thumbnail)
    for key in MODELSPEC_TEXTS:
        if value := getattr(options.metadata, f"metadata_{key}"):
            keys[key] = value
    return {f"modelspec.{key}": value for key, value in keys.items()}


def as_data_url(picture: str) -> str:
    """A picture file as text that holds the picture itself; such a text stays. Raises UserError if there is no such picture."""
    if picture.startswith("data:"):
        return picture
    kind = mimetypes.guess_type(picture)[0] or ""
    if not Path(picture).is_file() or not kind.startswith("image/"):
        raise UserError(f"--metadata_thumbnail {picture}: there is no such picture file; give a .png, .jpg or .webp file")
    return f"data:{kind};base64,{base64.b64encode(Path(picture).read_bytes()).decode('ascii')}"


def base_model_version(v2: bool, v_parameterization: bool) -> str:
    """`sd_v1`, `sd_v1_v`, `sd_v2` or `sd_v2_v`."""
    return ("sd_v2" if v2 else "sd_v1") + ("_v" if v_parameterization else "")


def all_model_facts(options: ModelOptions) -> dict[str, str]:
    """Names and hashes of the base model and, if one is given, of the VAE."""
    vae = model_facts("vae", options.vae) if options.vae else {}
    return model_facts("sd_model", options.pretrained_model_name_or_path) | vae


def model_facts(kind: str, name_or_path: str) -> dict[str, str]:
    """Name and hashes of a model; a hub id has no hashes, of a folder they say that it is one."""
    path = Path(name_or_path)
    facts = {f"ss_{kind}_name": path.name if path.exists() else name_or_path}
    if path.is_dir():
        facts |= {f"ss_{kind}_hash": "IsADirectory", f"ss_new_{kind}_hash": "IsADirectory"}
    elif path.is_file():
        facts |= {f"ss_{kind}_hash": legacy_hash_of_file(path), f"ss_new_{kind}_hash": sha256_of_file(path)}
    return facts


def commit_hash() -> str:
    """The git commit of this suite, or `(unknown)` outside a checkout."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "(unknown)"
    return result.stdout.strip() if result.returncode == 0 else "(unknown)"


def data_facts(options: TrainNetworkOptions, datasets: Sequence[DatasetFacts], processes: int) -> dict[str, Any]:
    """Pictures, buckets and tags. With a dataset file every dataset has an entry of its own, else the keys stand alone."""
    folders: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    tags: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for subset in dataset.subsets:
            name = _free_name(subset.folder, folders[subset.config.is_reg])
            folders[subset.config.is_reg][name] = {"n_repeats": subset.config.num_repeats, "img_count": subset.img_count}
        for folder, counts in dataset.tag_frequency.items():
            tags.setdefault(folder, counts)
    facts: dict[str, Any] = {"ss_dataset_dirs": folders[False], "ss_tag_frequency": tags}
    if options.data.dataset_config:
        return facts | {
            "ss_datasets": [_dataset_entry(dataset) for dataset in datasets],
            "ss_other_dataset_keys": other_dataset_keys(datasets),
        }
    config, first = datasets[0].config, datasets[0].subsets[0].config
    return facts | {
        "ss_reg_dataset_dirs": folders[True],
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": config.batch_size * processes * options.training.gradient_accumulation_steps,
        "ss_resolution": config.resolution,
        "ss_color_aug": first.color_aug,
        "ss_flip_aug": first.flip_aug,
        "ss_random_crop": first.random_crop,
        "ss_shuffle_caption": first.shuffle_caption,
        "ss_keep_tokens": first.keep_tokens,
        "ss_enable_bucket": config.enable_bucket,
        "ss_bucket_no_upscale": config.bucket_no_upscale,
        "ss_min_bucket_reso": config.min_bucket_reso,
        "ss_max_bucket_reso": config.max_bucket_reso,
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
        return {key: Path(value).name if key == "conditioning_data_dir" else value for key, value in values.items()}

    return [
        other(dataset.config, _dataset_entry(dataset))
        | {"subsets": [other(subset.config, _subset_entry(subset)) for subset in dataset.subsets]}
        for dataset in datasets
    ]


def _subset_entry(subset: SubsetFacts) -> dict[str, Any]:
    keys = (
        "num_repeats", "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens", "keep_tokens_separator",
        "secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix", "resize_interpolation",
    )  # fmt: skip
    config = subset.config
    entry = {"img_count": subset.img_count, "image_dir": config.image_dir.name, **{key: getattr(config, key) for key in keys}}
    if config.metadata_file:
        return entry | {"metadata_file": config.metadata_file.name}
    return entry | {"class_tokens": config.class_tokens, "is_reg": config.is_reg}
