"""Every option of the reference is refused by name or has a test that would fail if the option did nothing.

`EXERCISED` names that test for each option. That it would fail is checked by `benchmarks/options_do_something.py`, which runs
each of them with its option taken away.
"""

from __future__ import annotations

import ast
import csv
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from library.command_line import option_names
from library.data.config import DatasetDefaults
from library.processes import Processes, timeout
from library.training.metadata import model_spec
from library.training.options import TrainNetworkOptions, parse_options
from library.training.pictures import dataset_defaults
from library.training.plan import Plan, Start
from library.training.refused_options import REFUSED
from library.training.run import preview_specs
from library.training.validation import Validation, ValidationRecord

TESTS = Path(__file__).resolve().parents[2]
NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]

# Options of datasets: what they do there is tested below tests/library/data, under the key of the same name.
OF_DATASETS = {
    "dataset_repeats": ("num_repeats", 3), "train_batch_size": ("batch_size", 3), "resolution": ("resolution", (96, 96)),
    "enable_bucket": ("enable_bucket", True), "min_bucket_reso": ("min_bucket_reso", 128),
    "max_bucket_reso": ("max_bucket_reso", 512), "bucket_reso_steps": ("bucket_reso_steps", 8),
    "bucket_no_upscale": ("bucket_no_upscale", True), "resize_interpolation": ("resize_interpolation", "area"),
    "alpha_mask": ("alpha_mask", True), "caption_extension": ("caption_extension", ".txt"),
    "caption_extention": ("caption_extension", ".words"), "shuffle_caption": ("shuffle_caption", True),
    "caption_separator": ("caption_separator", ";"), "keep_tokens": ("keep_tokens", 2),
    "keep_tokens_separator": ("keep_tokens_separator", "|||"), "secondary_separator": ("secondary_separator", ";;;"),
    "enable_wildcard": ("enable_wildcard", True), "caption_prefix": ("caption_prefix", "a"),
    "caption_suffix": ("caption_suffix", "b"), "caption_dropout_rate": ("caption_dropout_rate", 0.5),
    "caption_dropout_every_n_epochs": ("caption_dropout_every_n_epochs", 2),
    "caption_tag_dropout_rate": ("caption_tag_dropout_rate", 0.5), "token_warmup_min": ("token_warmup_min", 2),
    "token_warmup_step": ("token_warmup_step", 0.5), "color_aug": ("color_aug", True), "flip_aug": ("flip_aug", True),
    "random_crop": ("random_crop", True), "face_crop_aug_range": ("face_crop_aug_range", (2.0, 4.0)),
    "validation_split": ("validation_split", 0.25), "validation_seed": ("validation_seed", 7),
}  # fmt: skip

# test file below tests/ -> test -> the options that it exercises
BY_TEST: dict[str, dict[str, str]] = {
    "library/training/test_options_walk.py": {
        "test_dataset_options_reach_the_datasets": " ".join(OF_DATASETS),
        "test_where_a_run_begins": "initial_step initial_epoch skip_until_initial_step max_train_steps",
        "test_when_to_validate_and_when_to_stop": (
            "validate_every_n_steps validate_every_n_epochs max_validation_steps early_stopping_patience"
        ),
        "test_the_sampler_of_prompts_that_name_none": "sample_sampler",
        "test_a_thumbnail_is_kept_as_a_picture": "metadata_thumbnail",
        "test_the_entry_hands_on_what_is_its_own": "console_log_level console_log_file console_log_simple from_metadata",
        "test_how_long_processes_wait": "ddp_timeout",
    },
    "library/test_command_line.py": {
        "test_output_config_writes_what_config_file_reads": "config_file",
        "test_the_trainer_writes_its_config_and_stops": "output_config",
    },
    "library/training/test_preflight.py": {"test_options_that_contradict_each_other_are_named": "sample_every_n_steps"},
    "library/diffusion/test_loss.py": {
        "test_weightings_against_the_formulas": (
            "min_snr_gamma debiased_estimation_loss scale_v_pred_loss_like_noise_pred v_pred_like_loss"
        ),
        "test_mean_square_of_noise_and_velocity": "v_parameterization zero_terminal_snr",
        "test_trap_5_7_huber_losses_with_each_schedule_and_scale": "loss_type huber_schedule huber_c huber_scale",
        "test_min_and_max_timestep": "min_timestep max_timestep",
    },
    "library/diffusion/test_noise.py": {
        "test_noise_offset_adds_one_number_to_each_channel_of_each_sample": "noise_offset",
        "test_noise_offset_random_strength_is_one_uniform_number_a_batch": "noise_offset_random_strength",
        "test_adaptive_noise_scale_follows_the_mean_of_each_channel_and_never_turns_round": "adaptive_noise_scale",
        "test_multires_noise_has_deviation_one_and_more_in_the_large": "multires_noise_iterations multires_noise_discount",
        "test_ip_noise_gamma_perturbs_the_input_alone": "ip_noise_gamma ip_noise_gamma_random_strength",
    },
    "library/training/test_precision.py": {
        "test_trained_weights_are_float32_unless_full": "full_fp16 full_bf16 mixed_precision",
        "test_a_loss_of_nan_is_explained": "no_half_vae",
    },
    "library/training/test_packing.py": {"test_formats_by_option": "base_dtype"},
    "library/training/test_checkpointing.py": {
        "test_a_run_with_a_budget_checkpoints_what_it_must_and_learns_the_same": (
            "gradient_checkpointing gradient_checkpointing_budget"
        )
    },
    "library/training/test_option_runs.py": {
        "test_fused_and_packed_and_compiled_runs_do_as_the_plain_one": (
            "fp8_base torch_compile dynamo_backend fused_backward_pass"
        ),
        "test_models_go_straight_to_the_device_in_the_format_of_the_arithmetic": "vae",
        "test_fp8_base_unet_leaves_the_text_encoder": "fp8_base_unet",
        "test_parts_that_previews_need_leave_the_gpu_unless_told_otherwise": "lowram highvram",
        "test_mem_eff_attn_wins_over_xformers": "mem_eff_attn xformers",
        "test_what_is_masked_out_makes_no_loss": "conditioning_data_dir masked_loss",
        "test_in_json_trains_on_what_it_lists": (
            "in_json on_bad_image cache_latents_to_disk vae_batch_size persistent_data_loader_workers "
            "max_data_loader_n_workers network_alpha"
        ),
    },
    "library/training/test_optimizers.py": {
        "test_adamw8bit_steps_on_a_cpu": "use_8bit_adam",
        "test_arguments_reach_the_optimizer_and_its_name": "optimizer_args",
        "test_sgd_nesterov_has_momentum_unless_given": "optimizer_type",
        "test_the_old_flag_means_lion": "use_lion_optimizer",
        "test_adafactor_with_relative_step_takes_no_rates_and_says_so": "learning_rate",
        "test_adafactor_with_rates_of_its_own": "max_grad_norm",
    },
    "library/training/test_schedules.py": {
        "test_linear": "lr_scheduler lr_warmup_steps",
        "test_warmup_stable_decay": "lr_decay_steps lr_scheduler_min_lr_ratio",
        "test_cosine_with_restarts": "lr_scheduler_num_cycles",
        "test_polynomial": "lr_scheduler_power",
        "test_inverse_sqrt": "lr_scheduler_timescale",
        "test_any_class": "lr_scheduler_type lr_scheduler_args",
    },
    "library/training/test_trainer.py": {
        "test_plan_arithmetic": "max_train_epochs gradient_accumulation_steps",
        "test_wrong_input_is_one_line": "pretrained_model_name_or_path output_dir output_name v2",
        "test_learning_rates_reach_their_groups": "unet_lr text_encoder_lr",
        "test_only_what_is_asked_for_is_trained": "network_train_unet_only network_train_text_encoder_only",
        "test_options_of_the_loss_and_the_text_do_something": "clip_skip max_token_length weighted_captions",
        "test_prior_loss_weight_is_for_regularisation_pictures_only": "prior_loss_weight reg_data_dir train_data_dir",
        "test_continuing_from_a_file": "network_weights dim_from_weights network_dim",
        "test_base_weights_are_merged_into_the_model": "base_weights base_weights_multiplier",
        "test_scale_weight_norms_bounds_every_module": "scale_weight_norms",
        "test_cached_latents_are_the_vae_s": "cache_latents",
        "test_a_loss_of_nan_can_be_skipped": "on_nonfinite_loss",
        "test_metadata": (
            "training_comment metadata_title metadata_author metadata_description metadata_license metadata_tags "
            "metadata_usage_hint metadata_trigger_phrase metadata_merged_from metadata_preprocessor "
            "metadata_is_negative_embedding"
        ),
        "test_trap_5_19_no_metadata_leaves_what_loaders_need": "no_metadata",
        "test_trap_5_20_metadata_with_a_dataset_file": "dataset_config",
        "test_sample_pictures": "sample_prompts sample_every_n_epochs sample_at_first",
        "test_debug_dataset_writes_a_sheet_and_stops": "debug_dataset",
        "test_trap_5_4_every_rate_is_logged_once_under_its_name": "logging_dir log_prefix",
        "test_pickled_formats_and_precision": "save_model_as save_precision",
        "test_save_n_epoch_ratio": "save_n_epoch_ratio",
        "test_files_of_a_run": "save_every_n_epochs save_every_n_steps save_last_n_epochs",
        "test_step_files_older_than_save_last_n_steps_are_removed": "save_last_n_steps",
        "test_same_seed_gives_the_same_bytes_with_any_number_of_workers_and_with_previews": "seed",
    },
    "library/training/test_dylora_runs.py": {
        "test_trap_3_3_the_batches_of_a_step_share_one_draw": "network_module",
        "test_wrong_words_name_the_option": "network_dropout network_args",
    },
    "library/training/test_trackers.py": {
        "test_a_run_tells_wandb_its_settings": "log_with log_tracker_name wandb_run_name wandb_api_key log_tracker_config",
        "test_a_run_tells_tensorboard_its_settings": "log_config",
    },
    "library/training/test_hub.py": {
        "test_a_run_leaves_its_files_on_the_hub_and_goes_on_from_there_and_the_token_is_nowhere": (
            "huggingface_token resume_from_huggingface save_state_to_huggingface huggingface_repo_id"
        ),
        "test_a_file_goes_into_its_folder_of_a_private_repository": "huggingface_path_in_repo",
        "test_public_and_without_a_folder": "huggingface_repo_type huggingface_repo_visibility",
        "test_in_the_background_all_arrive_before_the_end_and_before_a_removal": "async_upload",
    },
    "library/training/test_ema.py": {"test_training_finds_its_weights_as_they_were_to_the_bit": "ema_decay"},
    "library/training/test_resume.py": {
        "test_trap_5_1_and_5_2_resumed_twice_is_as_never_stopped": "resume save_state",
        "test_names_of_states_and_which_are_removed": "save_state_on_train_end save_last_n_epochs_state save_last_n_steps_state",
    },
}
# What holds without the option too, and the test that it holds.
ALWAYS_SO = {"sdpa": ("library/training/test_option_runs.py", "test_attention_is_torch_s_which_keeps_no_matrix_of_all_pairs")}
EXERCISED = {
    option: (file, test) for file, tests in BY_TEST.items() for test, options in tests.items() for option in options.split()
}


def reference() -> list[str]:
    with open(TESTS / "data" / "options-train_network.csv", encoding="utf-8") as file:
        return [row["option"][2:] for row in csv.DictReader(file)]


@cache
def sources_of(file: str) -> dict[str, str]:
    """The source of each test of a file, with its decorators."""
    source = (TESTS / file).read_text(encoding="utf-8")
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_every_option_is_exercised_or_refused():
    built = set(option_names(TrainNetworkOptions))
    assert set(reference()) - built == set(reference()) & set(REFUSED.reasons)
    assert EXERCISED.keys() | ALWAYS_SO.keys() == built, "name the test of a new option in BY_TEST"
    assert not EXERCISED.keys() & ALWAYS_SO.keys()
    assert all(test in sources_of(file) for file, test in ALWAYS_SO.values())


@pytest.mark.parametrize("option", EXERCISED)
def test_the_test_of_an_option_is_there_and_names_it(option):
    file, test = EXERCISED[option]
    source = sources_of(file)[test]
    constants = "\n".join(re.findall(r"^[A-Z_]+ = .*(?:\n[ \])}].*)*", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE))
    used = "\n".join(line for name in re.findall(r"\b[A-Z][A-Z_]+\b", source) for line in constants.split("\n\n") if name in line)
    assert re.search(rf"\b{option}\b", source + used)


@pytest.mark.parametrize("option", OF_DATASETS)
def test_dataset_options_reach_the_datasets(option):
    key, wanted = OF_DATASETS[option]
    value = ",".join(map(str, wanted)) if isinstance(wanted, tuple) else wanted
    words = [f"--{option}"] if wanted is True else [f"--{option}={value}"]
    defaults = dataset_defaults(parse_options([*NEEDED, *words]))
    assert isinstance(defaults, DatasetDefaults) and getattr(defaults, key) == wanted


def options(*words: str) -> TrainNetworkOptions:
    return parse_options([*NEEDED, *words])


def test_where_a_run_begins():
    def start(*words: str) -> tuple[int, int, int]:
        chosen = options("--max_train_steps=50", *words)
        found = Start.of(chosen.state, Plan.of(chosen, 10), None)
        return found.step, found.epoch, found.position

    assert start() == (0, 1, 0) and Plan.of(options("--max_train_steps=50"), 10).max_steps == 50
    assert start("--initial_epoch=3") == (20, 3, 0)
    assert start("--initial_step=13", "--initial_epoch=3") == (13, 2, 0)
    assert start("--initial_step=13", "--skip_until_initial_step") == (13, 2, 3)


def test_when_to_validate_and_when_to_stop():
    chosen = options(
        "--validate_every_n_steps=4", "--validate_every_n_epochs=2", "--max_validation_steps=3", "--early_stopping_patience=1"
    )
    dataset = SimpleNamespace(num_batches=9)
    validation = Validation(dataset, chosen.validation, torch.device("cpu"), Processes(), seed=1, timesteps=[], num_workers=0)
    assert [validation.due_after_step(step) for step in (3, 4, 8)] == [False, True, True]
    assert [validation.due_after_epoch(epoch) for epoch in (1, 2)] == [False, True]
    assert validation.batches == 3
    record = ValidationRecord()
    exhausted = []
    for step, loss in enumerate((1.0, 0.5, 0.7)):
        record.add(step, loss)
        exhausted.append(record.is_exhausted(chosen.validation.early_stopping_patience))
    assert exhausted == [False, False, True]


def test_the_sampler_of_prompts_that_name_none(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog --ss ddim\n", encoding="utf-8")
    dataset = SimpleNamespace(table=SimpleNamespace(configs=[SimpleNamespace(resolution=(64, 96))]))
    words = [f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_sampler=euler_a", "--sample_at_first"]
    specs = preview_specs(options(*words), dataset)
    assert [(spec.sampler, spec.width, spec.height) for spec in specs] == [("euler_a", 64, 96), ("ddim", 64, 96)]


def test_a_thumbnail_is_kept_as_a_picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    datasets = [SimpleNamespace(config=SimpleNamespace(resolution=(64, 64)))]
    found = model_spec(options(f"--metadata_thumbnail={tmp_path / 'a.png'}"), datasets)
    assert found["modelspec.thumbnail"].startswith("data:image/png;base64,iVBOR")


def test_the_entry_hands_on_what_is_its_own(monkeypatch):
    import train_network

    calls = []
    monkeypatch.setattr(train_network, "set_up_console", lambda *a: calls.append(a))
    monkeypatch.setattr("library.training.run.train", lambda *a: 0)
    monkeypatch.setattr("library.training.from_metadata.print_from_metadata", lambda *a: calls.append(a[:1]) or 0)
    words = ["--console_log_level=ERROR", "--console_log_file=x.log", "--console_log_simple"]
    for more in (words, ["--from_metadata=x.safetensors"]):
        monkeypatch.setattr("sys.argv", ["train_network.py", *NEEDED, *more])
        assert train_network.main() == 0
    assert calls == [("ERROR", "x.log", True), ("x.safetensors",)]


def test_how_long_processes_wait():
    assert timeout(options("--ddp_timeout=7").training.ddp_timeout).total_seconds() == 7 * 60
    assert timeout(options().training.ddp_timeout).total_seconds() != 7 * 60
