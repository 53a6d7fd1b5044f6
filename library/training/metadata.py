"""Metadata of a network file: the ss_* keys by which web interfaces and people find out how it was made.

Names and forms are those of sd-scripts. Every value is text, written the way Python prints it (`None`, `True`, `0.0001`).
"""

from __future__ import annotations

import json
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.data.facts import DatasetFacts
from library.files import legacy_hash_of_file, sha256_of_file
from library.training.network import parse_network_args
from library.training.options import TrainNetworkOptions

# What loaders need to use a file; all that --no_metadata leaves.
MINIMUM = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_v2", "ss_base_model_version")


class RunMetadata:
    """The metadata of one run; `at` gives that of a file saved at a moment of it."""

    def __init__(self, facts: Mapping[str, Any], minimum_only: bool) -> None:
        self.facts = dict(facts)
        self.minimum_only = minimum_only

    def at(self, step: int, epoch: int) -> dict[str, str]:
        """Metadata for a file saved after `step` optimizer steps; epoch: 1-based at an epoch's end, else epochs finished."""
        facts = {**self.facts, "ss_steps": step, "ss_epoch": epoch, "ss_training_finished_at": time.time()}
        if self.minimum_only:
            facts = {key: value for key, value in facts.items() if key in MINIMUM}
        return {key: as_text(value) for key, value in facts.items()}


def as_text(value: Any) -> str:
    """JSON for dictionaries and lists, else what Python prints."""
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def run_facts(
    options: TrainNetworkOptions,
    datasets: Sequence[DatasetFacts],
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
        "ss_num_batches_per_epoch": batches_per_epoch,
        "ss_num_epochs": epochs,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_max_train_steps": max_train_steps,
        "ss_lr_warmup_steps": rates.lr_warmup_steps,
        "ss_lr_scheduler": rates.lr_scheduler_type or rates.lr_scheduler,
        "ss_network_module": network.network_module,
        "ss_network_dim": 4 if network.network_dim is None else network.network_dim,
        "ss_network_alpha": network.network_alpha,
        "ss_network_dropout": network.network_dropout,
        "ss_scale_weight_norms": network.scale_weight_norms,
        "ss_mixed_precision": training.mixed_precision,
        "ss_full_fp16": False,
        "ss_v2": model.v2,
        "ss_base_model_version": base_model_version(model.v2, model.v_parameterization),
        "ss_clip_skip": model.clip_skip,
        "ss_max_token_length": captions.max_token_length,
        "ss_cache_latents": cache.cache_latents or cache.cache_latents_to_disk,
        "ss_seed": seed,
        "ss_lowram": False,
        "ss_noise_offset": training.noise_offset,
        "ss_min_snr_gamma": training.min_snr_gamma,
        "ss_prior_loss_weight": options.data.prior_loss_weight,
        "ss_max_grad_norm": rates.max_grad_norm,
        "ss_optimizer": optimizer,
        "ss_caption_dropout_rate": captions.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": captions.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": captions.caption_tag_dropout_rate,
        "ss_face_crop_aug_range": cache.face_crop_aug_range,
        "ss_training_comment": options.output.training_comment,
        "ss_sd_scripts_commit_hash": commit_hash(),
    }
    if network.network_args:
        facts["ss_network_args"] = parse_network_args(network.network_args)
    facts.update(model_facts("sd_model", model.pretrained_model_name_or_path))
    if model.vae:
        facts.update(model_facts("vae", model.vae))
    facts.update(data_facts(options, datasets, processes))
    return facts


def base_model_version(v2: bool, v_parameterization: bool) -> str:
    """`sd_v1`, `sd_v1_v`, `sd_v2` or `sd_v2_v`."""
    return ("sd_v2" if v2 else "sd_v1") + ("_v" if v_parameterization else "")


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
