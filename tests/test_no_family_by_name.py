"""What differs between families of models stands in library/models/: other code does not branch on which one it has."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def other_code():
    """Paths and trees of all files outside library/models/ but tests, which know what each family should be."""
    for room in ("library", "networks", "tools", "benchmarks", "assets", "."):
        for path in (ROOT / room).glob("*.py" if room == "." else "**/*.py"):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith("library/models/"):
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def decides_by_v2(node: ast.AST) -> bool:
    """Whether a condition or a comparison reads something called v2."""
    conditions = (
        [node.test] if isinstance(node, (ast.If, ast.IfExp, ast.While)) else [node] if isinstance(node, ast.Compare) else []
    )
    parts = [part for condition in conditions for part in ast.walk(condition)]
    return any(getattr(part, "id", getattr(part, "attr", None)) == "v2" for part in parts)


def compares_a_family(node: ast.AST) -> bool:
    """Whether `family.name`, or the name of anything that ends in `family`, is compared or looked up."""
    if not isinstance(node, (ast.Compare, ast.Match)):
        return False
    parts = ast.walk(node if isinstance(node, ast.Compare) else node.subject)
    owners = [part.value for part in parts if isinstance(part, ast.Attribute) and part.attr == "name"]
    return any(getattr(owner, "id", getattr(owner, "attr", "")).lower().endswith("family") for owner in owners)


def lines(finds, source: str) -> list[int]:
    return sorted(node.lineno for node in ast.walk(ast.parse(source)) if finds(node))


def test_no_code_compares_the_name_of_a_family():
    assert not {(name, node.lineno) for name, tree in other_code() for node in ast.walk(tree) if compares_a_family(node)}


def test_no_other_code_branches_on_v2():
    assert not {(name, node.lineno) for name, tree in other_code() for node in ast.walk(tree) if decides_by_v2(node)}


def test_the_search_finds_both():
    assert lines(compares_a_family, 'x\nif model.family.name == "sd1": pass\nif "sd2" in (family.name, 1): pass') == [2, 3]
    assert lines(decides_by_v2, "a = options.v2\nb = 1 if options.v2 else 2\nif not v2:\n    pass\nc = v2 == found") == [2, 3, 5]
