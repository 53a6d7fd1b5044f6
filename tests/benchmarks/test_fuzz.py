"""benchmarks/fuzz.py, a few inputs of each kind; and that it sees the faults it looks for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from safetensors.torch import save_file

from benchmarks import fuzz
from benchmarks.fuzzing import mutations, outcomes
from benchmarks.fuzzing.case import Case
from benchmarks.fuzzing.shelf import Shelf, make_shelf
from library.errors import UserError
from tests.library.training.small_runs import read_tokenizers_once

SHARE = 0.03


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("fuzz") / "shelf")


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_odd_inputs_end_well_or_are_refused_in_one_line(kind, shelf, tmp_path, monkeypatch):
    read_tokenizers_once(monkeypatch.setattr)
    rows = fuzz.run(seed=7, share=SHARE, kinds=[kind], folder=tmp_path, shelf=shelf, progress=False)
    assert rows[kind].counts["inputs"] >= 1 and rows[kind].faults == []


def judged(main, tmp_path: Path, **options) -> fuzz.Row:
    row = fuzz.Row()
    case = Case(main, [], tmp_path, **options)
    fuzz.note(row, "one", case, case.run(), outcomes.half_written(tmp_path))
    return row


def test_each_fault_is_seen(tmp_path):
    def wrong() -> None:
        raise UserError("the file is odd; mend it")

    assert judged(lambda: 1 / 0, tmp_path).counts["traceback"] == 1
    assert judged(wrong, tmp_path).counts["refused"] == 1
    assert judged(lambda: 3, tmp_path).counts["otherwise"] == 1
    assert judged(lambda: 2, tmp_path).counts["otherwise"] == 1  # refused without a word
    assert judged(lambda: 0, tmp_path, lost=lambda text: "a.png").counts["lost"] == 1
    assert judged(wrong, tmp_path, must_end_well=True).counts["good"] == 1
    assert judged(lambda: 0, tmp_path, must_end_well=True).faults == []


def test_half_a_file_is_seen(tmp_path, shelf):
    save_file(shelf.lora, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes(shelf.lora_file.read_bytes()[:-5])
    (tmp_path / ".whole.12ab34cd.safetensors").write_bytes(b"")
    (tmp_path / "half.png").write_bytes(b"no image")
    (tmp_path / ".x-state.12ab34cd").mkdir()
    (tmp_path / ".x-state.12ab34cd" / "record.json").write_text("{}", encoding="utf-8")
    (tmp_path / "..odd.name.txt").write_text("whole", encoding="utf-8")
    assert outcomes.half_written(tmp_path) == [
        ".whole.12ab34cd.safetensors", str(Path(".x-state.12ab34cd") / "record.json"), "half.png", "half.safetensors",
    ]  # fmt: skip


def test_an_input_is_made_of_seed_kind_and_number(shelf, tmp_path):
    first, second = (fuzz.run_one("caption", 5, 1, tmp_path / name, shelf) for name in ("one", "two"))
    assert first[0].words == second[0].words and first[1].code == second[1].code
    assert mutations.damaged(random.Random(1), b"abc" * 50) == mutations.damaged(random.Random(1), b"abc" * 50) != b"abc" * 50
