from __future__ import annotations

from pathlib import Path

import pytest

from library.data.config_keys import DatasetConfig, SubsetConfig
from library.testing import full_size_header
from library.training.checks import preflight
from library.training.checks.contradictions import contradictions
from library.training.checks.idle_options import idle_options
from library.training.options import parse_options

NEEDED = [
    "--pretrained_model_name_or_path=m",
    "--train_data_dir=d",
    "--output_dir=o",
    "--network_module=networks.lora",
    "--resolution=64",
]


def configs(*subsets: dict, **dataset) -> list[DatasetConfig]:
    made = tuple(SubsetConfig(image_dir=Path(f"{number}"), **values) for number, values in enumerate(subsets or ({},)))
    return [DatasetConfig(**{"resolution": (64, 64), **dataset}, subsets=made)]


# what is given without effect -> what else makes it work
IDLE = {
    "--save_state_to_huggingface --huggingface_repo_id=a/b": "--save_state_on_train_end",
    "--save_last_n_epochs_state=2 --save_every_n_epochs=1": "--save_state",
    "--save_last_n_epochs_state=2 --save_state": "--save_every_n_epochs=1",
    "--save_last_n_steps_state=2 --save_every_n_steps=1": "--save_state",
    "--save_last_n_steps_state=2 --save_state": "--save_every_n_steps=1",
    "--save_last_n_epochs=2": "--save_n_epoch_ratio=2",
    "--save_last_n_steps=2": "--save_every_n_steps=1",
    "--huggingface_path_in_repo=a": "--huggingface_repo_id=a/b",
    "--huggingface_token=a": "--huggingface_repo_id=a/b",
    "--async_upload": "--huggingface_repo_id=a/b",
    "--wandb_run_name=a": "--log_with=wandb",
    "--wandb_api_key=a --logging_dir=l": "--log_with=all",
    "--log_prefix=a": "--logging_dir=l",
    "--log_tracker_name=a": "--logging_dir=l",
    "--log_tracker_config=a": "--log_with=wandb",
    "--log_config": "--logging_dir=l",
    "--sample_sampler=euler": "--sample_prompts=p --sample_at_first",
    "--sample_prompts=p": "--sample_every_n_steps=1",
    "--lr_scheduler_num_cycles=2": "--lr_scheduler=cosine_with_restarts",
    "--lr_scheduler_power=2": "--lr_scheduler=polynomial",
    "--lr_scheduler_timescale=2": "--lr_scheduler=inverse_sqrt",
    "--lr_decay_steps=2": "--lr_scheduler=warmup_stable_decay",
    "--lr_scheduler_min_lr_ratio=0.1": "--lr_scheduler=cosine_with_min_lr",
    "--multires_noise_discount=0.5": "--multires_noise_iterations=3",
    "--huber_c=0.5": "--loss_type=huber",
    "--huber_schedule=constant": "--loss_type=smooth_l1",
    "--vae_batch_size=2": "--cache_latents_to_disk",
    "--dynamo_backend=eager": "--torch_compile",
    "--gradient_checkpointing_budget=4": "--gradient_checkpointing",
    "--no_half_vae": "--mixed_precision=bf16",
}
# what is given without effect beside something that wins; it works alone
BEATEN = {
    "--save_every_n_epochs=2": "--save_n_epoch_ratio=2",
    "--save_state_on_train_end": "--save_state",
    "--initial_epoch=2": "--initial_step=3",
    "--training_comment=a": "--no_metadata",
    "--metadata_title=a": "--no_metadata",
    "--max_train_steps=2": "--max_train_epochs=2",
    "--network_dim=8": "--dim_from_weights",
    "--network_alpha=8": "--dim_from_weights",
    "--text_encoder_lr=1": "--network_train_unet_only",
    "--unet_lr=1": "--network_train_text_encoder_only",
    "--lr_scheduler=cosine": "--lr_scheduler_type=StepLR",
    "--persistent_data_loader_workers": "--max_data_loader_n_workers=0",
    "--fp8_base_unet": "--fp8_base",
    "--fp8_base": "--base_dtype=fp8",
    "--xformers": "--mem_eff_attn",
    "--sample_every_n_steps=1 --sample_prompts=p": "--sample_every_n_epochs=1",
}
# options of the data -> datasets in which they do nothing, and in which they do something
DATA = {
    "--prior_loss_weight=0.5": (configs(), configs({}, {"is_reg": True})),
    "--validation_seed=1": (configs(), configs(validation_split=0.1, validation_seed=1)),
    "--validate_every_n_steps=1": (configs(), configs(validation_split=0.1)),
    "--validate_every_n_epochs=1": (configs(), configs(validation_split=0.1)),
    "--max_validation_steps=1": (configs(), configs(validation_split=0.1)),
    "--keep_tokens=1": (configs({"keep_tokens": 1}), configs({"keep_tokens": 1, "shuffle_caption": True})),
    "--token_warmup_min=2": (configs({"token_warmup_min": 2}), configs({"token_warmup_min": 2, "token_warmup_step": 5.0})),
    "--max_bucket_reso=512": (configs(max_bucket_reso=512), configs(max_bucket_reso=512, min_bucket_reso=64, enable_bucket=True)),
    "--bucket_no_upscale": (configs(bucket_no_upscale=True), configs(bucket_no_upscale=True, enable_bucket=True)),
    "--train_batch_size=2": (configs(batch_size=3), [*configs(batch_size=3), *configs(batch_size=2)]),
    "--dataset_repeats=2": (configs({"num_repeats": 3}), configs({"num_repeats": 3}, {"num_repeats": 2})),
    "--resolution=96": (configs(), configs(resolution=(96, 96))),
    "--flip_aug": (configs(), configs({}, {"flip_aug": True})),
}


def idle(words: str, datasets=None) -> list[str]:
    return idle_options(parse_options([*NEEDED, *words.split()]), configs() if datasets is None else datasets)


def names(found: list[str]) -> list[str]:
    return [text.split(" ")[0] for text in found]


@pytest.mark.parametrize("words", IDLE)
def test_what_does_nothing_is_named_with_what_it_needs(words):
    first = words.split("=")[0].split(" ")[0]
    assert names(idle(words)) == [first]
    assert first not in names(idle(f"{words} {IDLE[words]}"))


@pytest.mark.parametrize("words", BEATEN)
def test_what_is_beaten_is_named_with_what_wins(words):
    first = words.split("=")[0].split(" ")[0]
    assert idle(words) == []
    found = idle(f"{words} {BEATEN[words]}")
    assert names(found) == [first] and BEATEN[words].split("=")[0] in found[0].replace("is 0", "")


@pytest.mark.parametrize("words", DATA)
def test_options_of_the_data_are_held_against_the_datasets(words):
    without, with_effect = DATA[words]
    assert names(idle(words, without)) == [words.split("=")[0]]
    assert idle(words, with_effect) == []


def test_many_processes_may_be_waited_for(monkeypatch):
    assert names(idle("--ddp_timeout=5")) == ["--ddp_timeout"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert idle("--ddp_timeout=5") == []


def test_what_asks_for_nothing_is_not_named():
    """Front ends write every option they know, most of them switched off or at their default."""
    words = "--dynamo_backend=no --huber_c=0.1 --save_last_n_steps_state=0 --validate_every_n_steps=0 --lr_scheduler_power=1 "
    assert (
        idle(
            words
            + "--log_prefix= --sample_every_n_steps=0 --max_train_epochs=0 --multires_noise_discount=0.3 --max_train_steps=1600"
        )
        == []
    )


def test_all_are_reported_once_and_together(capsys, monkeypatch):
    options = parse_options([*NEEDED, "--log_prefix=a", "--huber_c=1", "--learning_rate=1e-4"])
    assert not contradictions(options)
    dataset = type("Dataset", (), {"table": type("Table", (), {"configs": configs()})})
    monkeypatch.setattr(preflight, "largest_batch", lambda dataset: (1, (64, 64)))
    monkeypatch.setattr(preflight, "estimated_bytes", lambda *a: 0)
    monkeypatch.setattr(preflight, "advice", lambda table: [])
    preflight.print_advice(options, dataset, preflight.torch.device("cpu"), full_size_header())
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == "given, but without effect: --huber_c (for --loss_type=huber, smooth_l1); --log_prefix (needs --logging_dir)"
    )
    assert len(lines) == 2 and lines[1].startswith("memory: ")
