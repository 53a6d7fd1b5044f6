"""Options: types, config file, unknown and refused names."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from library.command_line import option_names
from library.errors import UserError
from library.training.options import TrainNetworkOptions, parse_options
from library.training.refused_options import REFUSED

NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]
OPTIONS_CSV = Path(__file__).parents[1] / "data" / "options-train_network.csv"


def rows() -> list[dict[str, str]]:
    with open(OPTIONS_CSV, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["option"])
def test_every_option_of_the_reference_is_either_built_or_refused_by_name(row):
    name = row["option"][2:]
    built, refused = name in option_names(TrainNetworkOptions), name in REFUSED.reasons
    assert built != refused
    if refused:
        with pytest.raises(UserError, match=name):
            parse_options([*NEEDED, f"--{name}", "1"])


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["option"])
def test_defaults_are_those_of_the_reference(row):
    name = row["option"][2:]
    groups = option_names(TrainNetworkOptions)
    if name not in groups:
        return
    default = getattr(getattr(parse_options(NEEDED), groups[name]), name)
    wanted = row["default"]
    given = {"pretrained_model_name_or_path": "m", "train_data_dir": "d", "output_dir": "o", "network_module": "networks.lora"}
    if name in given:
        wanted = given[name]
    if wanted in ("None", "(empty string)"):
        assert default in (None, "")
    elif wanted in ("True", "False"):
        assert default is (wanted == "True")
    elif isinstance(default, (int, float)):
        assert default == float(wanted)
    else:
        assert default == wanted.strip('"')


def test_words_become_typed_values():
    options = parse_options([*NEEDED, "--learning_rate", "1e-4", "--network_args", "a=1", "b=2", "--cache_latents", "--resolution=512,768"])
    assert options.optimizer.learning_rate == 1e-4
    assert options.network.network_args == ["a=1", "b=2"]
    assert options.augmentation.cache_latents is True
    assert options.data.resolution == "512,768"


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--netwrk_dim", "4"], ["--netwrk_dim", "--network_dim"]),
        (["--network_dim", "four"], ["--network_dim", "four"]),
        (["--save_model_as", "bin"], ["--save_model_as", "safetensors"]),
        (["--learning_rate", "-1"], ["--learning_rate"]),
        (["--lr_warmup_steps", "1.5"], ["--lr_warmup_steps", "1.5"]),
        (["--lr_warmup_steps", "inf"], ["--lr_warmup_steps"]),
        (["--network_alpha", "inf"], ["--network_alpha"]),
        (["--network_dim"], ["--network_dim", "expected one argument"]),
        (["stray word"], ["stray word"]),
        (["--use_8bit_adam", "--optimizer_type=Lion"], ["--use_8bit_adam", "--optimizer_type"]),
        (["--sample_every_n_steps=5"], ["--sample_prompts"]),
        (["--config_file=missing"], ["missing"]),
    ],
)
def test_wrong_input_is_one_line_that_names_the_option(words, parts):
    with pytest.raises(UserError) as caught:
        parse_options([*NEEDED, *words])
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_trap_5_16_options_are_not_abbreviated():
    with pytest.raises(UserError, match="network_alpha"):
        parse_options([*NEEDED, "--network_al=8"])


def test_all_that_is_missing_is_said_at_once():
    with pytest.raises(UserError) as caught:
        parse_options([])
    for name in ("--pretrained_model_name_or_path", "--dataset_config", "--network_module", "--output_dir"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "text, wanted", [("100", 100), ("0.1", 0.1), ("10%", 0.1), ("1e3", 1000), ("0", 0)]
)
def test_trap_5_10_steps_may_be_a_number_a_share_or_a_percentage(text, wanted):
    assert parse_options([*NEEDED, "--lr_warmup_steps", text]).optimizer.lr_warmup_steps == pytest.approx(wanted)


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return f"--config_file={path}"


def test_config_file_is_flattened_and_the_command_line_wins(tmp_path):
    file = config(tmp_path, '[model]\npretrained_model_name_or_path = "m"\n[any]\nmax_train_steps = 7\nnetwork_dim = 8\nresolution = 64\n')
    options = parse_options([file, *NEEDED[1:], "--network_dim=16"])
    assert options.training.max_train_steps == 7 and options.network.network_dim == 16 and options.data.resolution == "64"


def test_config_file_may_be_named_without_its_suffix(tmp_path):
    file = config(tmp_path, "max_train_steps = 7\n").removesuffix(".toml")
    assert parse_options([file, *NEEDED]).training.max_train_steps == 7


@pytest.mark.parametrize(
    "text, part",
    [
        ("max_train_stps = 7", "max_train_steps"),
        ('max_train_steps = "many"', "max_train_steps"),
        ("masked_loss = true", "masked_loss"),
        ("= 3", "run.toml"),
        ("network_dim = true", "network_dim"),
        ('flip_aug = "yes"', "true or false"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "twice"),
        ('config_file = "other.toml"', "config_file"),
    ],
)
def test_trap_5_17_config_file_is_checked(tmp_path, text, part):
    with pytest.raises(UserError, match=part):
        parse_options([config(tmp_path, text), *NEEDED])


def test_trap_5_17_a_number_written_as_text_is_a_number(tmp_path):
    assert parse_options([config(tmp_path, 'learning_rate = "1e-4"'), *NEEDED]).optimizer.learning_rate == 1e-4


def test_config_file_of_a_graphical_front_end_with_refused_options_at_their_defaults(tmp_path):
    file = config(tmp_path, 'masked_loss = false\nloss_type = "l2"\nhuber_c = 0.1\nmultires_noise_iterations = 0\nnetwork_args = []\n')
    assert parse_options([file, *NEEDED]).network.network_args == []


def test_text_encoder_lr_list_uses_the_first():
    assert parse_options([*NEEDED, "--text_encoder_lr=1e-5"]).optimizer.text_encoder_lr == 1e-5
