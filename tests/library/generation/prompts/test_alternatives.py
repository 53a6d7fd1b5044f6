"""library/generation/prompts/alternatives.py: {a|b|c} in prompts."""

from __future__ import annotations

from random import Random

import pytest

from library.errors import UserError
from library.generation.prompts.alternatives import Template
from library.generation.prompts.written import WrittenPrompt


def texts(line: str, count: int = 1, seed: int = 0) -> list[str]:
    return [text.text for text in Template(WrittenPrompt(line, "here")).prompts(count, Random(seed))]


def test_one_at_random_for_each_image_anew():
    made = texts("a {red|green|blue} house", 60)
    assert set(made) == {"a red house", "a green house", "a blue house"}
    assert made == texts("a {red|green|blue} house", 60) != texts("a {red|green|blue} house", 60, seed=1)


def test_several_different_ones_joined():
    made = texts("{2$$a|b|c}", 60)
    assert set(made) == {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"}
    assert set(texts("x {2$$ and $$a|b}", 20)) == {"x a and b", "x b and a"}
    assert {len(made.split(", ")) for made in texts("{1-2$$a|b|c}", 60)} == {1, 2}


def test_enumeration_makes_an_image_for_each_whatever_the_count():
    assert texts("{e$$a|b|c} {e$$1|2}", 7) == ["a 1", "a 2", "b 1", "b 2", "c 1", "c 2"]
    assert texts("{e$$2$$a|b|c}") == ["a, b", "a, c", "b, c"]
    assert texts("{e$$1-2$$ and $$a|b}") == ["a", "b", "a and b"]
    assert Template(WrittenPrompt("{e$$a|b}", "")).enumerates and not Template(WrittenPrompt("{a|b}", "")).enumerates


def test_each_image_of_an_enumeration_has_its_own_random_choice():
    made = texts("{e$$1|2|3|4|5|6|7|8} {x|y}")
    assert [text[0] for text in made] == list("12345678") and {text[2] for text in made} == {"x", "y"}


@pytest.mark.parametrize("line", ["a cat", "a { cat", "a } cat", "a } { cat", ""])
def test_text_without_a_closed_pair_of_braces_stays(line):
    assert texts(line) == [line]


def test_empty_alternatives_and_single_ones():
    assert set(texts("a {|very }cat", 20)) == {"a cat", "a very cat"}
    assert texts("a {cat}") == ["a cat"]


def test_columns_are_those_of_the_line_as_it_was_written():
    line = "a {red|blue} cat {e$$--w 64|--q 5}"
    for text in Template(WrittenPrompt(line, "here")).prompts(1, Random(0)):
        for character, column in zip(text.text, text.columns, strict=True):
            assert line[column - 1] == character


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a {b|{c|d}}", "here, column 3: alternatives in braces do not nest"),
        ("a {4$$b|c}", r"here, column 3: \{4\$\$b\|c\} asks for 4 of 2 alternatives"),
        ("a {2-1$$b|c}", "asks for 2 to 1 of 2 alternatives"),
        ("a {0$$b|c}", "asks for 0 of 2"),
        ("a {x$$b|c}", r"here, column 3: \{x\$\$b\|c\} is not understood; write \{a\|b\}"),
    ],
)
def test_what_is_not_understood_is_named_with_its_column(line, message):
    with pytest.raises(UserError, match=message):
        Template(WrittenPrompt(line, "here"))
