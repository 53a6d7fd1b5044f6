"""The command lines of the LoRA tools."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.tools.command import Parser


def test_negative_numbers_in_any_notation_are_values_and_no_options():
    parser = Parser("x")
    parser.add_argument("--ratios", nargs="*", type=float)
    parser.add_argument("--lbw", nargs="*")
    args = parser.parse_args(
        ["--ratios", "-.5", "-5e-1", "-1E-3", "-2.", "-1_0", "0.5", "-inf", "--lbw", "-1,0.5,-1e-2", "-0.5,1"]
    )
    assert args.ratios == [-0.5, -0.5, -0.001, -2.0, -10.0, 0.5, float("-inf")]
    assert args.lbw == ["-1,0.5,-1e-2", "-0.5,1"]
    with pytest.raises(UserError, match="did you mean '--ratios'"):
        parser.parse_args(["--ratio", "-.5"])
