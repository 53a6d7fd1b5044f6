"""The floors of the house: imports only go down, entries import no entries, and no files import each other in a circle.

Every import counts, also one inside of a function; only what type checkers alone see does not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("library", "networks", "tools")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
}
GROUND = ("library.safe_text", "library.errors", "library.files", "library.parallel", "library.text_values", "library.formats")
HELPERS = (
    "library.command_line",
    "library.console",
    "library.devices",
    "library.freed_memory",
    "library.imports",
    "library.key_values",
    "library.network_modules",
    "library.openmp",
    "library.option_files",
    "library.option_traits",
    "library.processes",
    "library.sheets",
    "library.text_files",
)
# A room or file -> what of the project it may import, beside itself.
FLOORS = {
    "library.safe_text": (),
    "library.parallel": (),
    "library.text_values": (),
    "library.errors": (),
    "library.entry": ("library.safe_text", "library.errors"),
    "library.files": ("library.safe_text", "library.errors"),
    "library.formats": GROUND,
    "library.tools": GROUND,
    "library.diffusion": GROUND,
    "library.models": (*GROUND, "library.imports", "library.diffusion"),
    "library.pages": GROUND,
    "library.data": (*GROUND, *HELPERS, "library.models", "library.pages"),
    "library.generation": (*GROUND, *HELPERS, "library.diffusion", "library.models", "library.data", "library.pages"),
    "library.generation.prompts": (
        *GROUND,
        *HELPERS,
        "library.diffusion",
        "library.data",
        "library.generation.unsupported_options",
    ),
    "library.doctor": (*GROUND, "library.devices"),
    "networks": (*GROUND, "library.entry", "library.products", "library.tools"),
}
TORCH_ALONE = {"torch", "safetensors", "numpy"}  # of other projects, on the ground floor


def test_the_floors_are_those_of_files_that_exist():
    assert all((ROOT / name.replace(".", "/")).is_dir() or name in FILES for name in FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_imports_go_down(room):
    wrong = [
        f"{name} imports {target}"
        for name in sorted(FILES)
        if _is_in(name, (room,))
        for target in imports(name)
        if target in FILES and not _is_in(target, (room, *FLOORS[room]))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_library_does_not_know_network_modules_by_name():
    wrong = [
        f"{name} imports {target}"
        for name in FILES
        if name.startswith("library")
        for target in imports(name)
        if _is_in(target, ("networks",))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", GROUND)
def test_the_ground_floor_stands_on_torch_safetensors_and_numpy(room):
    """So a tool starts in the time of `import torch`."""
    for name in FILES:
        if _is_in(name, (room,)):
            others = {target.partition(".")[0] for target in imports(name)} - set(ROOMS) - sys.stdlib_module_names
            assert others <= TORCH_ALONE, name


def test_nothing_imports_an_entry():
    """An entry is run. What two entries need stands in a room below them."""
    entries = {name for name, path in FILES.items() if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")}
    assert {"networks.merge_lora", "train_network", "tools.doctor"} <= entries
    wrong = [f"{name} imports {target}" for name in FILES for target in imports(name) if target in entries]
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle():
    circles = [" -> ".join(circle) for circle in _circles()]
    assert not circles, "\n".join(circles)


def _is_in(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@cache
def imports(name: str) -> frozenset[str]:
    """What a file imports, by its full dotted name: modules of this project as such, of others as they stand there."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    return frozenset(target for node in _nodes(tree) for target in _targets(node))


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, without those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _nodes(child)


def _targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports name the whole path"
        for alias in node.names:
            inside = f"{node.module}.{alias.name}"
            yield inside if inside in FILES else node.module or ""


def _circles() -> Iterator[list[str]]:
    """Paths that come back to where they began, one for each file that closes one."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> Iterator[list[str]]:
        if name in path:
            yield [*path[path.index(name) :], name]
        elif name not in done:
            for target in sorted(imports(name) & FILES.keys()):
                yield from walk(target, [*path, name])
            done.add(name)

    for name in sorted(FILES):
        yield from walk(name, [])
