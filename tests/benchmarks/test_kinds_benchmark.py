"""benchmarks/kinds.py: every kind of file beside the program that writes it, as results/kinds.md shows it."""

from __future__ import annotations

import pytest

pytest.importorskip("lycoris", reason="an extra: pip install lycoris-lora")
pytest.importorskip("peft", reason="an extra: pip install peft")


def test_every_kind_is_as_near_as_float32_is():
    from benchmarks import kinds

    rows = kinds.rows()
    assert len(rows) == len(kinds.lycoris.KINDS) + len(kinds.lycoris.DORA) + len(kinds.CORES) + 1
    for row in rows:
        numbers = {title: number for title, number in row.items() if title != "kind"}
        assert numbers and all(0 <= number < 1e-4 for number in numbers.values()), row
    assert len(kinds.table(rows)) == len(rows) + 2
