"""Every option of the reference is refused by name or has a test that would fail if the option did nothing.

Such a test says so: `@pytest.mark.option("min_snr_gamma")`. That it would fail is checked by
`benchmarks/options_do_something.py`, which runs each of them with its option taken away.
"""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from option_marks import marked_options
from PIL import Image

from library.command_line import option_names
from library.data.config_keys import DatasetDefaults
from library.generation.prompts.spec import PromptSpec
from library.models import sd1
from library.processes import Processes, timeout
from library.training.checks.unsupported_options import UNSUPPORTED
from library.training.datasets import dataset_defaults
from library.training.options import TrainNetworkOptions, parse_options
from library.training.outputs.metadata import model_spec
from library.training.plan import Plan, Progress
from library.training.setup import preview_specs
from library.training.validation import Validation
from library.training.validator import Validator

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

# What holds without the option too: its test says that it holds.
ALWAYS_SO = {"sdpa"}


def reference() -> list[str]:
    with open(TESTS / "data" / "options-train_network.csv", encoding="utf-8") as file:
        return [row["option"][2:] for row in csv.DictReader(file)]


def test_every_option_is_exercised_or_refused():
    built = set(option_names(TrainNetworkOptions))
    assert set(reference()) - built == set(reference()) & set(UNSUPPORTED.reasons)
    assert marked_options().keys() | OF_DATASETS.keys() == built, 'mark the test of a new option: @pytest.mark.option("its_name")'


@pytest.mark.parametrize("option", OF_DATASETS)
def test_dataset_options_reach_the_datasets(option):
    key, wanted = OF_DATASETS[option]
    value = ",".join(map(str, wanted)) if isinstance(wanted, tuple) else wanted
    words = [f"--{option}"] if wanted is True else [f"--{option}={value}"]
    defaults = dataset_defaults(parse_options([*NEEDED, *words]))
    assert isinstance(defaults, DatasetDefaults) and getattr(defaults, key) == wanted


def options(*words: str) -> TrainNetworkOptions:
    return parse_options([*NEEDED, *words])


@pytest.mark.option("initial_step", "initial_epoch", "skip_until_initial_step", "max_train_steps")
def test_where_a_run_begins():
    def start(*words: str) -> tuple[int, int, int]:
        chosen = options("--max_train_steps=50", *words)
        found = Progress.at_start(chosen.state, Plan.of(chosen.training, 10), None)
        return found.step, found.epoch, found.position

    assert start() == (0, 1, 0) and Plan.of(options("--max_train_steps=50").training, 10).max_steps == 50
    assert start("--initial_epoch=3") == (20, 3, 0)
    assert start("--initial_step=13", "--initial_epoch=3") == (13, 2, 0)
    assert start("--initial_step=13", "--skip_until_initial_step") == (13, 2, 3)


@pytest.mark.option("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps", "early_stopping_patience")
def test_when_to_validate_and_when_to_stop():
    chosen = options(
        "--validate_every_n_steps=4", "--validate_every_n_epochs=2", "--max_validation_steps=3", "--early_stopping_patience=1"
    )
    dataset = SimpleNamespace(num_batches=9)
    validation = Validation(dataset, chosen.validation, torch.device("cpu"), Processes(), seed=1, timesteps=[], num_workers=0)
    rest = {name: None for name in ("step", "eval_weights", "weights", "tracker")}
    validator = Validator(chosen.validation, validation, **rest)
    assert [validator.is_due_after_step(step) for step in (3, 4, 8)] == [False, True, True]
    assert [validator.is_due_after_epoch(epoch) for epoch in (1, 2)] == [False, True]
    assert validation.batches == 3
    stops = []
    for step, loss in enumerate((1.0, 0.5, 0.7)):
        validator.record.add(step, loss)
        stops.append(validator.wants_to_stop())
    assert stops == [False, False, True]


@pytest.mark.option("sample_sampler")
def test_trap_34_prompts_that_name_no_sampler_and_size_get_those_of_the_run(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog --ss ddim\n", encoding="utf-8")
    words = [f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_sampler=euler_a", "--sample_at_first"]
    specs = preview_specs(options(*words).previews, PromptSpec(width=64, height=96))
    assert [(spec.sampler, spec.width, spec.height) for spec in specs] == [("euler_a", 64, 96), ("ddim", 64, 96)]


@pytest.mark.option("metadata_thumbnail")
def test_a_thumbnail_is_kept_as_an_image(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    datasets = [SimpleNamespace(config=SimpleNamespace(resolution=(64, 64)))]
    found = model_spec(options(f"--metadata_thumbnail={tmp_path / 'a.png'}"), datasets, sd1.FAMILY.records)
    assert found["modelspec.thumbnail"].startswith("data:image/png;base64,iVBOR")


@pytest.mark.option("console_log_level", "console_log_file", "console_log_simple", "from_metadata")
def test_the_entry_hands_on_what_is_its_own(monkeypatch):
    from library.training import program

    calls = []
    monkeypatch.setattr(program, "set_up_console", lambda *a: calls.append(a))
    monkeypatch.setattr("library.training.entry.train", lambda *a, **words: 0)
    monkeypatch.setattr("library.training.outputs.from_metadata.print_from_metadata", lambda *a: calls.append(a[:1]) or 0)
    words = ["--console_log_level=ERROR", "--console_log_file=x.log", "--console_log_simple"]
    for more in (words, ["--from_metadata=x.safetensors"]):
        monkeypatch.setattr("sys.argv", ["train_network.py", *NEEDED, *more])
        assert program.main() == 0
    assert calls == [("ERROR", "x.log", True), ("x.safetensors",)]


@pytest.mark.option("ddp_timeout")
def test_how_long_processes_wait():
    assert timeout(options("--ddp_timeout=7").training.ddp_timeout).total_seconds() == 7 * 60
    assert timeout(options().training.ddp_timeout).total_seconds() != 7 * 60
