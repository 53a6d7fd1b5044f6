"""library/generation/outputs/comparison.py: the sheet of --sheet."""

from __future__ import annotations

import pytest
from PIL import Image

from library.generation.outputs import comparison as module
from library.generation.outputs.comparison import Comparison, columns_of
from library.generation.prompts.spec import PromptSpec

FILES = ["out/a-4.safetensors", "out/a-8.safetensors"]


def labels(*arguments) -> list[tuple[str, tuple[float, ...] | None]]:
    return [(column.label, column.multipliers) for column in columns_of(*arguments)]


def test_networks_one_by_one_at_their_own_strengths():
    assert labels(FILES, [], None) == [("a-4", (1, 0)), ("a-8", (0, 1))]
    assert labels(FILES, [0.5], None) == [("a-4 x 0.5", (0.5, 0)), ("a-8", (0, 1))]


def test_networks_by_strengths_and_zero_once_as_no_network():
    assert labels(FILES, [], [0, 0.5, 1]) == [
        ("no network", (0, 0)), ("a-4 x 0.5", (0.5, 0)), ("a-4 x 1", (1, 0)), ("a-8 x 0.5", (0, 0.5)), ("a-8 x 1", (0, 1)),
    ]  # fmt: skip
    assert labels([], [], None) == [("", None)]


def test_names_that_are_alike_show_their_folders():
    assert [label for label, _ in labels(["x/last.pt", "y/last.pt", "z/b.pt"], [], None)] == ["x/last", "y/last", "b"]


@pytest.fixture
def sheet_words(monkeypatch):
    """What the sheet is drawn from."""
    seen = {}

    def contact_sheet(rows, row_labels, column_labels, title):
        colours = [[image and image.getpixel((0, 0)) for image in row] for row in rows]
        seen.update(rows=colours, row_labels=row_labels, column_labels=column_labels, title=title)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(module, "contact_sheet", contact_sheet)
    return seen


def draw(comparison: Comparison, rows: list[PromptSpec], leave_out: int | None = None) -> None:
    for index, _ in enumerate(comparison.specs(rows)):
        if index != leave_out:
            comparison.add(index, Image.new("L", (600, 300), index))
    comparison.draw("model")


def test_rows_are_prompts_and_seeds_and_columns_are_networks(sheet_words):
    comparison = Comparison(columns_of(FILES, [], None))
    rows = [PromptSpec("cat", seed=1), PromptSpec("cat", seed=2), PromptSpec("dog", seed=1)]
    # A column after the other, so that neighbours can be made together.
    assert [spec.multipliers for spec in comparison.specs(rows)] == [(1, 0)] * 3 + [(0, 1)] * 3
    draw(comparison, rows, leave_out=4)
    assert sheet_words == {
        "rows": [[0, 3], [1, None], [2, 5]], "row_labels": ["seed 1: cat", "seed 2: cat", "seed 1: dog"],
        "column_labels": ["a-4", "a-8"], "title": "model",
    }  # fmt: skip


def test_one_seed_stands_in_the_title(sheet_words):
    draw(Comparison(columns_of(FILES, [], None)), [PromptSpec("cat", seed=3), PromptSpec("dog", seed=3)])
    assert sheet_words["row_labels"] == ["cat", "dog"] and sheet_words["title"] == "model, seed 3"


def test_without_networks_columns_are_seeds(sheet_words):
    rows = [PromptSpec(prompt, seed=seed) for prompt in ("cat", "dog") for seed in (1, 2)]
    draw(Comparison(columns_of([], [], None)), rows)
    assert sheet_words["rows"] == [[0, 1], [2, 3]] and sheet_words["row_labels"] == ["cat", "dog"]
    assert sheet_words["column_labels"] == ["seed 1", "seed 2"]
    draw(Comparison(columns_of([], [], None)), [PromptSpec("cat", seed=1), PromptSpec("cat", seed=2), PromptSpec("dog", seed=9)])
    assert sheet_words["row_labels"] == ["seeds 1, 2: cat", "seeds 9: dog"] and sheet_words["column_labels"] == []


def test_the_sheet_itself():
    comparison = Comparison(columns_of(FILES, [], None))
    for index, _ in enumerate(comparison.specs([PromptSpec("cat", seed=1)])):
        comparison.add(index, Image.new("RGB", (64, 64), "red"))
    sheet = comparison.draw("model")
    assert sheet.width > 2 * 192 and (255, 0, 0) in {colour for _, colour in sheet.getcolors(1 << 24)}
