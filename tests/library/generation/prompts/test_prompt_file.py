"""library/generation/prompts/prompt_file.py: prompts of previews, and how they read in-line options."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from library.errors import UserError
from library.generation.prompts.inline import parse_line
from library.generation.prompts.prompt_file import read_prompt_file
from library.generation.prompts.spec import PromptSpec

DEFAULTS = PromptSpec(width=256, height=320, sampler="euler")


def read(line: str) -> PromptSpec:
    return replace(DEFAULTS, **parse_line(line, "here", lenient=True))


@pytest.fixture
def written(tmp_path):
    def write(name: str, text: str):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_line_without_options_takes_the_defaults():
    assert read("  a cat, (sitting:1.2)  ") == PromptSpec("a cat, (sitting:1.2)", "", 256, 320, None, 7.5, 30, "euler")


def test_every_option():
    spec = read("a cat --n blurry, bad --w 768 --h 512 --d 7 --l 4.5 --s 12 --ss k_euler_a")
    assert spec == PromptSpec("a cat", "blurry, bad", 768, 512, 7, 4.5, 12, "k_euler_a")


def test_options_ignore_case_and_the_last_one_counts():
    spec = read("a cat --W 128 --w 192\t--D   3")
    assert (spec.width, spec.seed) == (192, 3)


@pytest.mark.parametrize(("given", "used"), [("500", 496), ("64", 64), ("7", 64), ("71", 64), ("72", 72)])
def test_sizes_are_rounded_down_to_eight_and_at_least_64(given, used):
    assert read(f"a --w {given} --h {given}").width == used


@pytest.mark.parametrize(("given", "used"), [("0", 1), ("-5", 1), ("5000", 1000), ("20", 20)])
def test_steps_are_clamped(given, used):
    assert read(f"a --s {given}").steps == used


@pytest.mark.parametrize("prompt", ["w 5 cats", "s 20 dogs", "n word", "d 3", "a cat w 5 h 7", "well-known--thing", "ss euler"])
def test_trap_5_15_the_prompt_itself_is_never_read_as_options(prompt):
    assert read(f"{prompt} --s 4") == PromptSpec(prompt, "", 256, 320, None, 7.5, 4, "euler")


def test_an_empty_prompt_may_have_options():
    assert read("--w 128 --n x") == PromptSpec("", "x", 128, 320, sampler="euler")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --q 5", r"unknown option '--q' in here, column 7"),
        ("a cat --steps 5", r"unknown option '--steps' in here, column 7"),
        ("a cat --s 5 --sss euler", r"unknown option '--sss' in here, column 13; did you mean '--ss'\?"),
        ("a cat --w wide", r"here, column 7: option --w 'wide' is not a whole number"),
        ("a cat --w 5.5", r"option --w '5.5' is not a whole number"),
        ("a cat --w -8", r"option --w '-8' is not a number of pixels"),
        ("a cat --l high", r"option --l 'high' is not a number"),
        ("a cat --l nan", r"option --l 'nan' is not a number"),
        ("a cat --d -1", r"option --d '-1' is not a whole number from 0"),
        ("a cat --n", r"option --n has no value"),
        ("a cat --s 5 --w", r"here, column 13: option --w has no value"),
        ("a cat --ss eular", r"column 7: option --ss: unknown sampler 'eular'; did you mean 'euler'\?"),
    ],
)
def test_what_is_not_understood_is_named_with_its_column(line, message):
    with pytest.raises(UserError, match=message):
        read(line)


def test_options_of_other_model_families_are_ignored_with_one_line(written, caplog):
    path = written("p.txt", "a cat --g 3 --w 128 --fs 2\na dog --cn hint.png --g 4\n")
    with caplog.at_level(logging.WARNING):
        specs = read_prompt_file(path, DEFAULTS)
    assert [spec.prompt for spec in specs] == ["a cat", "a dog"] and specs[0].width == 128
    assert len(caplog.records) == 1 and "--g, --fs, --cn" in caplog.text


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.prompt", "prompts"])
def test_text_files_skip_blank_lines_and_comments(written, name):
    path = written(name, "\ufeffa cat\n\n# a comment --w bad\n   # an indented one\n  a dog --d 3\r\nein Löwe 狮子\n")
    specs = read_prompt_file(path, DEFAULTS)
    assert [(spec.prompt, spec.seed) for spec in specs] == [("a cat", None), ("a dog", 3), ("ein Löwe 狮子", None)]


def test_errors_in_a_file_name_file_and_line(written):
    path = written("p.txt", "# first\n\na cat --w 8x\n")
    with pytest.raises(UserError, match=r"p\.txt, line 3, column 7: option --w '8x'"):
        read_prompt_file(path, DEFAULTS)


TOML = """
[prompt]
negative_prompt = "bad"
width = 515
sample_steps = 12
scale = 5

[[prompt.subset]]
prompt = "a cat"
width = 128
seed = 4

[[prompt.subset]]
prompt = "w 5 dogs"
sample_sampler = "ddim"
"""


def test_trap_5_14_toml_subset_wins_over_the_common_table(written):
    first, second = read_prompt_file(written("p.toml", TOML), DEFAULTS)
    assert first == PromptSpec("a cat", "bad", 128, 320, 4, 5.0, 12, "euler")
    assert second == PromptSpec("w 5 dogs", "bad", 512, 320, None, 5.0, 12, "ddim")


def test_trap_5_14_other_suffixes_are_text_and_indented_hash_is_a_comment(written):
    assert len(read_prompt_file(written("p.prompts", "a cat\n  # no\n"), DEFAULTS)) == 1


def test_toml_without_subsets_is_one_prompt(written):
    assert read_prompt_file(written("p.TOML", '[prompt]\nprompt = "a cat"\n'), DEFAULTS)[0].prompt == "a cat"


def test_json_objects_and_lines(written):
    path = written("p.json", '[{"prompt": "a cat", "height": 64, "scale": 1, "seed": 5}, "a dog --w 64"]')
    assert read_prompt_file(path, DEFAULTS) == [
        PromptSpec("a cat", height=64, width=256, seed=5, scale=1.0, sampler="euler"),
        PromptSpec("a dog", width=64, height=320, sampler="euler"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.toml", "[prompt\n", "line 1, column 8: this is no TOML"),
        ("p.toml", "prompt = 3\n", "begin it with the line"),
        ("p.toml", "[prompts]\nprompt='x'\n", "unknown table or key 'prompts'.*did you mean 'prompt'"),
        ("p.toml", "[[prompt.subset]]\nwidth = 3\n", r"\[\[prompt.subset\]\] 1: has no prompt"),
        (
            "p.toml",
            "[[prompt.subset]]\nprompt='x'\n[[prompt.subset]]\nprompt='x'\nwidht = 3\n",
            r"'widht' in .*\]\] 2; did you mean 'width'",
        ),
        ("p.toml", "[[prompt.subset]]\nprompt='x'\nseed = '3'\n", "key 'seed' must be a number, not '3'"),
        ("p.toml", "[[prompt.subset]]\nprompt='x'\nseed = true\n", "key 'seed' must be a number, not True"),
        ("p.toml", "[[prompt.subset]]\nprompt=3\n", "key 'prompt' must be text"),
        ("p.toml", "[[prompt.subset]]\nprompt='x'\nwidth = 64.5\n", "'width' '64.5' is not a whole number"),
        ("p.toml", "[[prompt.subset]]\nprompt='x'\nsample_sampler = 'ddin'\n", "did you mean 'ddim'"),
        ("p.toml", "", "holds no prompt"),
        ("p.json", "[{", "this is no JSON"),
        ("p.json", '{"prompt": "x"}', "must be a list"),
        ("p.json", "[3]", "item 1: must be a text or an object"),
        ("p.json", '["a", "b --w x"]', "item 2, column 3: option --w"),
        ("p.txt", "# nothing\n\n", "holds no prompt"),
    ],
)
def test_bad_files_are_named(written, name, text, message):
    with pytest.raises(UserError, match=message):
        read_prompt_file(written(name, text), DEFAULTS)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="--sample_prompts .*no such file"):
        read_prompt_file(tmp_path / "no.txt", DEFAULTS)
    (tmp_path / "latin.txt").write_bytes("Löwe".encode("latin-1"))
    with pytest.raises(UserError, match="no UTF-8"):
        read_prompt_file(tmp_path / "latin.txt", DEFAULTS)


def test_controlnet_key_is_ignored_with_a_line(written, caplog):
    path = written("p.json", '[{"prompt": "a cat", "controlnet_image": "x.png"}]')
    with caplog.at_level(logging.WARNING):
        assert read_prompt_file(path, DEFAULTS)[0].prompt == "a cat"
    assert "controlnet_image" in caplog.text
