"""Options that were given and change nothing, because of what else was given or not: told once, together, before training.

Front ends write many of these into every config file, so that they are no errors. An option counts as given if it has a value
that asks for something and is not its default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from library.command_line import groups_of
from library.data.config_keys import AS_OPTION_NAMES, DatasetConfig
from library.processes import launched_world
from library.training.options import TrainNetworkOptions
from library.training.pictures import dataset_defaults
from library.training.trackers import wants

# Names of options, whether they are idle, and why.
Rule = tuple[Iterable[str], Any, str]


def idle_options(options: TrainNetworkOptions, configs: Sequence[DatasetConfig]) -> list[str]:
    """What is given and does nothing, each with the reason: `--log_prefix (needs --logging_dir)`."""
    found: dict[str, str] = {}
    rules = (saving_rules, log_rules, learning_rules, loss_rules, machine_rules)
    for names, idle, why in [rule for make in rules for rule in make(options)] + data_rules(options, configs):
        for name in names:
            if idle and is_given(options, name):
                found.setdefault(name, f"--{name} ({why})")
    found |= {name: text for name, text in overruled(options, configs) if name not in found}
    return list(found.values())


def is_given(options: TrainNetworkOptions, name: str) -> bool:
    """Whether an option has a value that asks for something and is not its default."""
    group = next(group for group, cls in groups_of(TrainNetworkOptions).items() if name in cls.model_fields)
    value = getattr(getattr(options, group), name)
    return value not in (None, "", 0, []) and value != groups_of(TrainNetworkOptions)[group].model_fields[name].get_default()


def saving_rules(options: TrainNetworkOptions) -> list[Rule]:
    """Files, states, their copies on the hub, and what is written into them."""
    output, state, hub = options.output, options.state, options.hub
    by_epoch = output.save_every_n_epochs or output.save_n_epoch_ratio
    saves_state = state.save_state or state.save_state_on_train_end
    hub_names = ("huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility", "async_upload")
    texts = [name for name in type(options.metadata).model_fields if name.startswith("metadata_")]
    return [
        (["save_every_n_epochs"], output.save_n_epoch_ratio, "--save_n_epoch_ratio wins"),
        (["save_last_n_epochs"], not by_epoch, "needs --save_every_n_epochs"),
        (["save_last_n_steps"], not output.save_every_n_steps, "needs --save_every_n_steps"),
        (["save_last_n_epochs_state", "save_last_n_steps_state"], not state.save_state, "needs --save_state"),
        (["save_last_n_epochs_state"], not by_epoch, "needs --save_every_n_epochs"),
        (["save_last_n_steps_state"], not output.save_every_n_steps, "needs --save_every_n_steps"),
        (["save_state_on_train_end"], state.save_state, "--save_state does that too"),
        (["save_state_to_huggingface"], not saves_state, "no state is saved: needs --save_state or --save_state_on_train_end"),
        (hub_names, not hub.huggingface_repo_id, "needs --huggingface_repo_id"),
        (["huggingface_token"], not hub.huggingface_repo_id and not hub.resume_from_huggingface, "needs --huggingface_repo_id"),
        (["initial_epoch"], state.initial_step is not None, "--initial_step wins"),
        ([*texts, "training_comment"], options.metadata.no_metadata, "--no_metadata leaves it out"),
    ]


def log_rules(options: TrainNetworkOptions) -> list[Rule]:
    """Logs and sample pictures."""
    logs, previews = options.logs, options.previews
    wandb, tracked = wants(logs, "wandb"), wants(logs, "wandb") or wants(logs, "tensorboard")
    moments = previews.sample_every_n_epochs or previews.sample_every_n_steps or previews.sample_at_first
    return [
        (["wandb_run_name", "wandb_api_key"], not wandb, "needs --log_with=wandb or all"),
        (["log_prefix"], not logs.logging_dir, "needs --logging_dir"),
        (["log_tracker_name", "log_tracker_config", "log_config"], not tracked, "needs --logging_dir or --log_with"),
        (["sample_sampler"], not previews.sample_prompts, "needs --sample_prompts"),
        (["sample_prompts"], not moments, "needs --sample_every_n_epochs, --sample_every_n_steps or --sample_at_first"),
        (["sample_every_n_steps"], previews.sample_every_n_epochs, "--sample_every_n_epochs wins"),
    ]


def learning_rules(options: TrainNetworkOptions) -> list[Rule]:
    """Network, optimizer and the length of the run."""
    network, rates = options.network, options.optimizer
    name, own = rates.lr_scheduler, rates.lr_scheduler_type
    with_least = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
    return [
        (["max_train_steps"], options.training.max_train_epochs, "--max_train_epochs wins"),
        (["network_dim", "network_alpha"], network.dim_from_weights, "--dim_from_weights takes them from the file"),
        (["text_encoder_lr"], network.network_train_unet_only, "--network_train_unet_only"),
        (["unet_lr"], network.network_train_text_encoder_only, "--network_train_text_encoder_only"),
        (["lr_scheduler"], own, "--lr_scheduler_type wins"),
        (["lr_scheduler_num_cycles"], own or name != "cosine_with_restarts", "for --lr_scheduler=cosine_with_restarts"),
        (["lr_scheduler_power"], own or name != "polynomial", "for --lr_scheduler=polynomial"),
        (["lr_scheduler_timescale"], own or name != "inverse_sqrt", "for --lr_scheduler=inverse_sqrt"),
        (["lr_decay_steps"], own or name != "warmup_stable_decay", "for --lr_scheduler=warmup_stable_decay"),
        (["lr_scheduler_min_lr_ratio"], own or name not in with_least, f"for --lr_scheduler={', '.join(with_least)}"),
    ]


def loss_rules(options: TrainNetworkOptions) -> list[Rule]:
    """Noise and loss."""
    loss = options.loss
    huber = ["huber_schedule", "huber_c", "huber_scale"]
    return [
        (["multires_noise_discount"], not loss.multires_noise_iterations, "needs --multires_noise_iterations"),
        (huber, loss.loss_type not in ("huber", "smooth_l1"), "for --loss_type=huber and smooth_l1"),
    ]


def machine_rules(options: TrainNetworkOptions) -> list[Rule]:
    """Memory, speed and processes."""
    cache, precision, model = options.augmentation, options.precision, options.model
    compiles = precision.torch_compile or precision.dynamo_backend == "no"
    return [
        (["vae_batch_size"], not (cache.cache_latents or cache.cache_latents_to_disk), "needs --cache_latents"),
        (["persistent_data_loader_workers"], not cache.max_data_loader_n_workers, "--max_data_loader_n_workers is 0"),
        (["dynamo_backend"], not compiles, "needs --torch_compile"),
        (["fp8_base", "fp8_base_unet"], precision.base_dtype, "--base_dtype says it"),
        (["fp8_base_unet"], precision.fp8_base, "--fp8_base does that too"),
        (["gradient_checkpointing_budget"], not options.training.gradient_checkpointing, "needs --gradient_checkpointing"),
        (["no_half_vae"], options.training.mixed_precision == "no", "with --mixed_precision=no all is float32"),
        (["xformers"], model.mem_eff_attn, "--mem_eff_attn wins"),
        (["ddp_timeout"], launched_world() == 1, "there is one process"),
    ]


def data_rules(options: TrainNetworkOptions, configs: Sequence[DatasetConfig]) -> list[Rule]:
    """Options of the data that need something in the datasets, whether it was given there or on the command line."""
    subsets = [subset for config in configs for subset in config.subsets]
    changing = any(s.shuffle_caption or s.caption_tag_dropout_rate or s.token_warmup_step for s in subsets)
    bucketed = [config for config in configs if config.enable_bucket]
    validation = ["validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"]
    return [
        (["prior_loss_weight"], not any(subset.is_reg for subset in subsets), "there are no regularisation pictures"),
        (
            validation,
            not any(config.validation_split for config in configs),
            "no pictures are held out: needs --validation_split",
        ),
        (["keep_tokens"], not changing, "needs --shuffle_caption or --caption_tag_dropout_rate"),
        (["token_warmup_min"], not any(subset.token_warmup_step for subset in subsets), "needs --token_warmup_step"),
        (["min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"], not bucketed, "needs --enable_bucket"),
        (
            ["min_bucket_reso", "max_bucket_reso"],
            all(c.bucket_no_upscale for c in bucketed),
            "--bucket_no_upscale leaves sizes to the pictures",
        ),
    ]


def overruled(options: TrainNetworkOptions, configs: Sequence[DatasetConfig]) -> Iterator[tuple[str, str]]:
    """Options of the data for which every dataset, or every folder's name, says something else."""
    for key, value in dataset_defaults(options).model_dump(exclude_none=True).items():
        name = AS_OPTION_NAMES.get(key, key)
        if not is_given(options, name):
            continue
        places = configs if key in DatasetConfig.model_fields else [subset for config in configs for subset in config.subsets]
        if all(getattr(place, key) != value for place in places):
            yield (
                name,
                f"--{name} ({'the names of the folders say' if key == 'num_repeats' else 'the dataset file says'} otherwise)",
            )
