"""library/generation/prompts/inline.py: options in a line of prompt."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.generation.prompts.inline import parse_line


def read(line: str) -> dict:
    return parse_line(line, "here")


def test_every_option_of_the_reference():
    line = "a cat --n blurry, bad --w 768 --h 512 --s 12 --d 7,8 --l 4.5 --nl 2 --t 0.3 --am 0.5,-1 --ss k_euler_a"
    assert read(line + " --dsd1 2 --dst1 700 --dsd2 1 --dst2 300 --dsr 0.25") == {
        "prompt": "a cat", "negative_prompt": "blurry, bad", "width": 768, "height": 512, "steps": 12, "seeds": (7, 8),
        "scale": 4.5, "negative_scale": 2.0, "strength": 0.3, "multipliers": (0.5, -1.0), "sampler": "k_euler_a",
        "deep_shrink.depth_1": 2,
        "deep_shrink.timestep_1": 700, "deep_shrink.depth_2": 1, "deep_shrink.timestep_2": 300, "deep_shrink.ratio": 0.25,
    }  # fmt: skip
    assert read("a --nl none")["negative_scale"] is None


def test_previews_and_images_read_what_both_have_alike():
    line = "a --n b --w 768 --h 512 --s 12 --l 4.5 --ss euler"
    assert parse_line(line, "here", lenient=True) == read(line)


def test_a_check_error_names_the_line_and_column():
    def check(name: str, value: object) -> None:
        raise UserError(f"is {value} today")

    with pytest.raises(UserError, match="here, column 9: option --s is 5 today"):
        parse_line("a cat --s 5", "here", columns=range(3, 30), check=check)


def test_case_is_ignored_and_the_last_one_counts():
    assert read("a --W 64 --w 128") == {"prompt": "a", "width": 128}


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
        ("a cat --ss eular", r"column 7: option --ss: unknown sampler 'eular'; did you mean 'euler'\?"),
        ("a cat --dsd1 4", r"option --dsd1 '4' is not a depth from 0 to 3"),
        ("a cat --dsr 5", r"column 7: option --dsr '5' is not a number above 0 and at most 1"),
    ],
)
def test_what_is_not_understood_is_named_with_its_column(line, message):
    with pytest.raises(UserError, match=message):
        read(line)
