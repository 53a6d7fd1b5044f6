"""Which test notices which option: `@pytest.mark.option("min_snr_gamma")` on the test says so."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]


@cache
def marked_options() -> dict[str, tuple[str, str]]:
    """Option -> (test file below tests/, name of the test), read from the marks without running anything."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                where = (path.relative_to(TESTS).as_posix(), node.name)
                found |= {option: where for decorator in node.decorator_list for option in _options_of(decorator)}
    return found


def _options_of(decorator: ast.expr) -> list[str]:
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.option":
        return [ast.literal_eval(argument) for argument in decorator.args]
    return []
