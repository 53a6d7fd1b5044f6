from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

from library.errors import UserError
from library.key_values import arguments_for, read_pairs
from library.network_modules import check_module_arguments, module_arguments
from library.text_values import read_value


@pytest.mark.parametrize(
    "words",
    [
        ["decay=0.5", "on=True", "betas=0.9,0.99"],
        ["decay=0.5 on=True betas=0.9,0.99"],
        ["decay=0.5", "on=True", "betas=0.9,0.99,"],
        ["decay=0.5;on=True;betas=0.9,0.99;"],
        [" decay = 0.5 ", "on =True", "betas= 0.9,0.99"],
        ["decay=0.5", "on=True", "on=True", "betas=0.9,0.99", ","],
        ["decay='0.5'", 'on="True"', "betas=0.9,0.99"],
    ],
    ids=str,
)
def test_pairs_are_understood_however_they_are_separated(words):
    assert read_pairs(words, "--o") == {"decay": "0.5", "on": "True", "betas": "0.9,0.99"}


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["betas=(0.9,", "0.99)", "eps=1"], {"betas": "(0.9, 0.99)", "eps": "1"}),
        (["betas=0.9,", "0.99", "eps=1"], {"betas": "0.9, 0.99", "eps": "1"}),
        (["step_rules=1:10,0.1:20,0.01"], {"step_rules": "1:10,0.1:20,0.01"}),
        (["preset='my file, a=1.toml' dim=2"], {"preset": "my file, a=1.toml", "dim": "2"}),
        ([r"preset=C:\my loras\p=1.toml"], {"preset": r"C:\my loras\p=1.toml"}),
        (["a=b=c"], {"a": "b=c"}),
        ([], {}),
        (None, {}),
    ],
    ids=str,
)
def test_values_keep_what_is_theirs(words, wanted):
    assert read_pairs(words, "--o") == wanted


@pytest.mark.parametrize(
    "words, part",
    [
        (["decay"], "expected key=value, got 'decay'"),
        (["a=1", "decay"], "expected key=value, got 'decay'"),
        (["weight-decay=1"], "expected key=value, got 'weight-decay=1'"),
        (["decay="], "'decay' has no value"),
        (["decay=,"], "'decay' has no value"),
        (["decay=0.5,", "on=True"], "a comma stands behind 'decay=0.5'; put only a blank between two arguments"),
        (["decay=0.5, on=True"], "a comma stands behind 'decay=0.5'"),
        (["decay=0.5,on=True"], "a comma stands behind 'decay=0.5'"),
        (["decay=0.5", ",", "on=True"], "a comma stands behind 'decay=0.5'"),
        (["decay=1", "decay=2"], "decay is given twice, as 1 and as 2"),
    ],
    ids=str,
)
def test_what_is_no_pair_is_refused(words, part):
    with pytest.raises(UserError, match=f"^--o: .*{part}"):
        read_pairs(words, "--o")


@pytest.mark.parametrize(
    "text, value",
    [
        *((text, True) for text in ("True", "true", "TRUE", "yes", "on")),
        *((text, False) for text in ("False", "false", "FALSE", "no", "Off")),
        *((text, None) for text in ("None", "none", "null")),
        *((text, 0.0001) for text in ("1e-4", "1E-4", "1.0e-4", ".0001", "+0.0001", "0.000_1")),
        ("-3", -3), ("1_000", 1000), ("0x10", 16), ("inf", math.inf), ("-inf", -math.inf),
        ("1e400", "1e400"), ("-.1e999", "-.1e999"),
        *((text, (0.9, 0.99)) for text in ("0.9,0.99", "(0.9, 0.99)", "( .9 , .99 , )")),
        ("[1, 2]", [1, 2]), ("(1,)", (1,)), ("(1)", 1), ("((1,2),3)", ((1, 2), 3)), ("(true,off)", (True, False)),
        ("cosine", "cosine"), ("1:10", "1:10"), ("'8'", "8"), ("10%", "10%"),
    ],
)  # fmt: skip
def test_values_in_any_usual_spelling(text, value):
    found = read_value(text)
    assert found == value and type(found) is type(value)


def plain(params, lr=1e-3, decay=0.0, betas=(0.9, 0.99), on=False, mode="mean", beta3=None):
    """A callee without annotations."""


def annotated(params, steps: int, share: float | list[float] = 0.5, name: str | None = None, flag: bool | None = None):
    """A callee with annotations."""


@pytest.mark.parametrize(
    "callee, word, value",
    [
        (plain, "on=0", False), (plain, "on=1", True), (plain, "on=false", False), (plain, "decay=1", 1),
        (plain, "betas=[0.9, 0.99]", (0.9, 0.99)), (plain, "mode=5", "5"), (plain, "mode=sum", "sum"), (plain, "beta3=0.5", 0.5),
        (annotated, "steps=1e2", 100), (annotated, "share=0.1,0.2", [0.1, 0.2]), (annotated, "name=true", "true"),
        (annotated, "flag=off", False), (annotated, "flag=None", None),
    ],
)  # fmt: skip
def test_an_argument_is_of_the_kind_that_the_callee_expects(callee, word, value):
    (found,) = arguments_for(callee, [word], "--o").values()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "callee, word, part",
    [
        (plain, "on=x", "true or false"),
        (plain, "on=2", "true or false"),
        (plain, "decay=0,5", "a number"),
        (plain, "decay=True", "a number"),
        (plain, "decay=1;2", "a number"),
        (plain, "decay=nan", "not a number"),
        (plain, "betas=0.9,0.99,0.999", "2 numbers with commas between them"),
        (plain, "betas=0.9", "2 numbers"),
        (plain, "beta3=x", "a number"),
        (plain, "dcay=1", "did you mean 'decay'"),
        (annotated, "steps=1.5", "a number"),
        (annotated, "flag=maybe", "true or false"),
        (torch.optim.AdamW, "amsgrad=x", "true or false"),
    ],
)
def test_a_value_of_another_kind_names_key_and_value(callee, word, part):
    with pytest.raises(UserError, match=part) as raised:
        arguments_for(callee, [word], "--o")
    assert "--o" in str(raised.value) and (word in str(raised.value) or "dcay" in str(raised.value))


def test_what_is_given_elsewhere_is_refused_with_the_cure():
    with pytest.raises(UserError, match="--o lr=1: give --learning_rate"):
        arguments_for(plain, ["lr=1"], "--o", {"lr": "give --learning_rate"})


def test_what_goes_to_open_arguments_is_read_all_the_same():
    def open_ended(params, **others):
        """Takes anything."""

    assert arguments_for(open_ended, ["a=false b=x"], "--o") == {"a": False, "b": "x"}
    assert arguments_for(open_ended, ["a=false"], "--o", read_other=str) == {"a": "false"}


def test_lycoris_gets_no_text_that_says_no():
    """It takes every text but "false" for true, for some keys that one too."""
    texts = {"use_scalar": "off", "decompose_both": "False", "conv_dim": "4", "dropout": "0", "rescaled": "true"}
    wanted = {"use_scalar": False, "decompose_both": False, "conv_dim": "4", "dropout": False, "rescaled": "True"}
    assert module_arguments(ModuleType("lycoris.kohya"), texts) == wanted
    numbers = {"conv_dim": "1e1", "factor": "8.0", "block_size": "0x10", "constraint": "1e-4", "preset": "1.0.toml"}
    wanted = {"conv_dim": "10", "factor": "8", "block_size": "16", "constraint": "1e-4", "preset": "1.0.toml"}
    assert module_arguments(ModuleType("lycoris.kohya"), numbers) == wanted  # which reads them by `int`
    assert module_arguments(ModuleType("networks.lora"), texts) == texts | {"use_scalar": "False", "rescaled": "True"}


def test_an_algorithm_or_a_preset_that_lycoris_lacks():
    module = pytest.importorskip("lycoris.kohya", reason="an extra of requirements-extras.txt")
    check_module_arguments(module, {"algo": "LoHa", "preset": "attn-mlp"}, "--network_args")
    check_module_arguments(ModuleType("of.others"), {"algo": "x", "preset": "x"}, "--network_args")
    with pytest.raises(UserError, match="unknown --network_args algo 'lohaa'; did you mean 'loha'"):
        check_module_arguments(module, {"algo": "lohaa"}, "--network_args")
    with pytest.raises(UserError, match="preset=atn-mlp: there is no such preset and no such file; did you mean 'attn-mlp'"):
        check_module_arguments(module, {"preset": "atn-mlp"}, "--network_args")


def test_a_key_that_lycoris_does_not_read_and_a_preset_that_is_no_toml(tmp_path):
    module = pytest.importorskip("lycoris.kohya", reason="an extra of requirements-extras.txt")
    check_module_arguments(module, {"conv_dim": "4", "dora_wd": "True", "factor": "8", "use_cp": "no"}, "--network_args")
    with pytest.raises(UserError, match="unknown --network_args key 'conv_dimm'; did you mean 'conv_dim'"):
        check_module_arguments(module, {"conv_dimm": "4"}, "--network_args")
    for key in ("for_inference", "weights_sd", "network_dim"):  # arguments of its functions, and no words
        with pytest.raises(UserError, match=f"unknown --network_args key '{key}'"):
            check_module_arguments(module, {key: "1"}, "--network_args")
    preset = tmp_path / "mine.toml"
    preset.write_text("enable_conv = true\n", encoding="utf-8")
    check_module_arguments(module, {"preset": str(preset)}, "--network_args")
    preset.write_text("][", encoding="utf-8")
    with pytest.raises(UserError, match="mine.toml, line 1, column 1: this is no TOML"):
        check_module_arguments(module, {"preset": str(preset)}, "--network_args")
