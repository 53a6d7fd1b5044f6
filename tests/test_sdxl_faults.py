"""Every fault in tests/data/faults-sdxl.csv, of other trainers and tools with SDXL, has a test that names its number."""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def rows() -> list[dict[str, str]]:
    with open(TESTS / "data" / "faults-sdxl.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_all_are_listed_once():
    assert [int(row["fault"]) for row in rows()] == list(range(1, 64))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["fault"])
def test_each_is_named_by_its_tests(row):
    tests = row["tests"].split()
    assert tests
    for test in tests:
        file, _, name = test.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
        assert row["fault"] in re.findall(r"\d+", name), test
