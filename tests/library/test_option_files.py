"""Configuration files of front ends: clear ones run, others are recognised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.data.config import datasets_from_file
from library.data.config_keys import DatasetDefaults
from library.errors import UserError
from library.generation.prompts.spec import PromptSpec
from library.training.checks.contradictions import contradictions
from library.training.checks.preflight import check_prompts
from library.training.options import parse_options
from library.training.setup import preview_specs


def parsed(tmp_path: Path, text: str, name: str = "c.toml"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return parse_options([f"--config_file={tmp_path / name}"])


def problems_of(tmp_path: Path, text: str, name: str = "c.toml") -> list[str]:
    with pytest.raises(UserError) as raised:
        parsed(tmp_path, text, name)
    return getattr(raised.value, "problems", [str(raised.value)])


@pytest.mark.parametrize(
    "line",
    [
        'model_train_type = "sd-lora"',
        'model_train_type = "sdxl-lora"',
        "cache_text_encoder_outputs = false",
        "cache_text_encoder_outputs_to_disk = false",
        "enable_bonus_of_others = false",
        'ui_custom_params = ""',
    ],
)
def test_keys_that_ask_for_nothing_are_passed_over(tmp_path, line):
    assert parsed(tmp_path, f"{line}\nnetwork_dim = 8\n").network.network_dim == 8


@pytest.mark.parametrize(
    "line, part",
    [
        ('model_train_type = "flux-lora"', "LoRAs are trained here, for the model that is given"),
        ("flip_agu = false", "did you mean 'flip_aug'"),
        ("zebra_stripes = 3", "no option is like it"),
    ],
)
def test_other_keys_are_refused_with_the_cure(tmp_path, line, part):
    (problem,) = problems_of(tmp_path, line)
    assert part in problem and len(problem) < 400


def test_a_json_file_holds_options_too(tmp_path):
    assert parsed(tmp_path, json.dumps({"network_dim": 8, "optimizer_args": ["a=1"]}), "c.json").network.network_dim == 8
    (problem,) = problems_of(tmp_path, "{not json", "c.json")
    assert "c.json, line 1, column 2: this is no JSON" in problem


@pytest.mark.parametrize(
    "name, text, parts",
    [
        ("gui.json", '{"LoRA_type": "Standard", "epoch": 2, "max_resolution": "64,64"}', ["kohya_ss GUI", "config_lora-*.toml"]),
        ("data.toml", "[[datasets]]\nresolution = 64\n", ["is a dataset file", "--dataset_config="]),
        ("one.json", '{"training_method": "LORA", "base_model_name": "x", "epochs": 2}', ["OneTrainer", "lora_rank network_dim"]),
        ("pipe.toml", "epochs = 1\n[model]\ntype = 'sdxl'\n[adapter]\nrank = 8\n", ["diffusion-pipe", "rank network_dim"]),
        ("job.yaml", "job: extension\n", ["YAML is not read", "as TOML"]),
        ("list.json", "[1, 2]", ["list.json: expected", "got a list"]),
        ("easy.toml", '[[subsets]]\nimage_dir = "x"\n[network_args.args]\ndim = 4\n', ["LoRA_Easy_Training_Scripts", "'args'"]),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, name, text, parts):
    (problem,) = problems_of(tmp_path, text, name)
    assert all(part in problem for part in parts)


def test_text_stands_for_a_list_of_one(tmp_path):
    (tmp_path / "c.toml").write_text('network_args = "conv_dim=4 conv_alpha=1"\nbase_weights = "a b.pt"\n', encoding="utf-8")
    options = parse_options([f"--config_file={tmp_path / 'c.toml'}"])
    assert options.network.network_args == ["conv_dim=4 conv_alpha=1"] and options.network.base_weights == ["a b.pt"]


def test_many_strange_keys_are_a_screen_at_most(tmp_path):
    found = problems_of(tmp_path, "".join(f"zebra_{number} = 1\n" for number in range(40)))
    assert len(found) == 13 and "holds 28 more keys" in found[-1] and max(map(len, found)) < 400


@pytest.mark.parametrize("text", ["network_module = 'networks.lora'\n", "[training]\noutput_dir = 'x'\n"])
def test_a_training_config_given_as_dataset_file(tmp_path, text):
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="holds options of the training; give it as --config_file="):
        datasets_from_file(tmp_path / "c.toml", DatasetDefaults())


@pytest.mark.parametrize("exists", [True, False])
def test_a_prompt_file_with_no_moment_to_sample_at_is_not_looked_at(tmp_path, exists):
    if exists:
        (tmp_path / "prompt.txt").write_text("", encoding="utf-8")
    words = [f"--sample_prompts={tmp_path / 'prompt.txt'}", "--sample_every_n_epochs=0"]
    options = parse_options(words)
    check_prompts(options.previews)
    assert preview_specs(options.previews, PromptSpec()) == []
    assert not any("sample" in problem for problem in contradictions(options))
    with pytest.raises(UserError):
        check_prompts(parse_options([*words, "--sample_every_n_steps=1"]).previews)
