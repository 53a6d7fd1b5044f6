"""library/generation/prompt_lines.py: in-line options of gen_img_diffusers.py."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.generation.prompt_lines import LineRules, read_prompt_line
from library.generation.prompts import DeepShrink, PromptSpec

NO_SHRINK = {"depth_1": None, "timestep_1": 650, "depth_2": None, "timestep_2": 650, "ratio": 0.5}
ALL = LineRules(networks=3)


def read(line: str, rules: LineRules = ALL):
    return read_prompt_line(line, "here", rules)


def test_every_option_of_the_reference():
    line = read("a cat --n blurry, bad --w 768 --h 512 --s 12 --d 7,8 --l 4.5 --nl 2 --t 0.3 --am 0.5,-1 --ss k_euler_a")
    assert line.seeds == (7, 8)
    assert line.spec(PromptSpec(), NO_SHRINK) == PromptSpec(
        "a cat", "blurry, bad", 768, 512, None, 4.5, 12, "k_euler_a", 2.0, 0.3, (0.5, -1.0)
    )


def test_what_a_line_leaves_open_is_as_on_the_command_line():
    defaults = PromptSpec(width=64, height=128, scale=3.0, negative_scale=2.0, strength=0.4)
    assert read("a --nl none").spec(defaults, NO_SHRINK) == PromptSpec(
        "a", width=64, height=128, scale=3.0, negative_scale=None, strength=0.4
    )


def test_case_is_ignored_and_the_last_one_counts():
    assert read("a --W 64 --w 128").values == {"prompt": "a", "width": 128}


def test_trap_6_12_deep_shrink_holds_for_its_own_line_alone():
    shrunk, plain = read("a --dsd1 2 --dst1 700 --dsr 0.25"), read("b")
    assert shrunk.spec(PromptSpec(), NO_SHRINK).deep_shrink == DeepShrink(2, 700, None, 650, 0.25)
    assert plain.spec(PromptSpec(), NO_SHRINK).deep_shrink is None
    everywhere = NO_SHRINK | {"depth_1": 1}
    assert read("c --dsd2 0 --dst2 9").spec(PromptSpec(), everywhere).deep_shrink == DeepShrink(1, 650, 0, 9, 0.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --q 5", r"unknown option '--q' in here, column 7"),
        ("a cat --nc 5", r"unknown option '--nc' in here, column 7; did you mean '--n'\?"),
        ("a cat --s 5 --c dog", r"here, column 13: option --c is not supported: guidance by CLIP"),
        ("a cat --glt 5", r"option --glt is not supported: gradual latent is not built"),
        ("a cat --w 500", r"here, column 7: option --w '500' is not a multiple of 8 from 64 on"),
        ("a cat --h 0", r"option --h '0' is not a multiple of 8"),
        ("a cat --s 0", r"column 7: option --s '0' is not a number of steps from 1 to 1000"),
        ("a cat --d 1,x", r"option --d '1,x' is not a whole number"),
        ("a cat --d -1", r"option --d '-1' is not a whole number from 0"),
        ("a cat --l high", r"option --l 'high' is not a number"),
        ("a cat --nl", r"option --nl has no value"),
        ("a cat --t 1.5", r"option --t '1.5' is not a number from 0 to 1"),
        ("a cat --am 1;2", r"option --am '1;2' is not a list of numbers with commas"),
        ("a cat --am 1,2,3,4", r"column 7: option --am has 4 strengths for 3 network\(s\)"),
        ("a cat --ss eular", r"column 7: option --ss: unknown sampler 'eular'; did you mean 'euler'\?"),
        ("a cat --dsd1 4", r"option --dsd1 '4' is not a depth from 0 to 3"),
        ("a cat --dsr 5", r"column 7: option --dsr '5' is not a number above 0 and at most 1"),
    ],
)
def test_what_is_not_understood_is_named_with_its_column(line, message):
    with pytest.raises(UserError, match=message):
        read(line)


@pytest.mark.parametrize(
    ("line", "rules", "message"),
    [
        ("a --t 0.5", LineRules(redraws=False), "column 3: option --t needs --image_path or --highres_fix_scale"),
        ("a --am 1", LineRules(networks=0), "column 3: option --am needs --network_weights"),
        ("a --am 1", LineRules(networks=1, sheet=True), "column 3: option --am has no place with --sheet"),
        ("a --dsr 0.5", LineRules(shrinks=False), "here: Deep Shrink has no depth"),
        ("a --dsd1 1 --dst2 500", LineRules(shrinks_twice=False), "here: Deep Shrink has no second depth"),
    ],
)
def test_what_says_nothing_in_this_run_is_named(line, rules, message):
    with pytest.raises(UserError, match=message):
        read(line, rules)
