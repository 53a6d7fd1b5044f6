"""The contact sheet of --sheet: every prompt and seed beside each other for every network and strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from library.generation.prompts.spec import PromptSpec
from library.sheets import LARGEST_CELL, contact_sheet


@dataclass(frozen=True)
class Column:
    """One network alone at one strength (or none), as strengths for all networks."""

    label: str
    multipliers: tuple[float, ...] | None


def columns_of(files: Sequence[str], multipliers: Sequence[float], strengths: Sequence[float] | None) -> list[Column]:
    """Each network alone, at its own strength or at each of `strengths`; strength 0 is one column without network, the first.

    Without networks there is one column without a label.
    """
    if not files:
        return [Column("", None)]
    own = [*multipliers, *[1.0] * (len(files) - len(multipliers))]
    names = _short_names(files)
    columns = [Column("no network", (0.0,) * len(files))] if strengths and 0 in strengths else []
    for index, name in enumerate(names):
        for strength in [own[index]] if strengths is None else [s for s in dict.fromkeys(strengths) if s != 0]:
            alone = tuple(strength if other == index else 0.0 for other in range(len(files)))
            columns.append(Column(name if strength == 1 and strengths is None else f"{name} x {strength:g}", alone))
    return columns


def _short_names(files: Sequence[str]) -> list[str]:
    """File names without suffix, with the folder where two are alike."""
    stems = [Path(file).stem for file in files]
    return [
        f"{Path(file).parent.name}/{stem}" if stems.count(stem) > 1 else stem for file, stem in zip(files, stems, strict=True)
    ]


@dataclass(frozen=True)
class Grid:
    """Labels of the columns and rows of a sheet, and the number of the spec in each cell."""

    title: str
    columns: list[str]
    rows: list[str]
    cells: list[list[int]]


class Comparison:
    """Collects the images of a run into a grid: a row for each prompt and seed, a column for each network and strength."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = list(columns)
        self.rows: list[PromptSpec] = []
        self.images: dict[int, Image.Image] = {}  # small ones, by the number of the spec
        self.files: dict[int, Path] = {}  # in which they were saved

    def specs(self, rows: Sequence[PromptSpec]) -> list[PromptSpec]:
        """The spec of every image, a column after the other: those of a column can share a batch."""
        self.rows = list(rows)
        return [
            spec if column.multipliers is None else replace(spec, multipliers=column.multipliers)
            for column in self.columns
            for spec in self.rows
        ]

    def add(self, index: int, image: Image.Image) -> None:
        """A finished image, by its number among the specs."""
        small = image.copy()
        small.thumbnail((LARGEST_CELL, LARGEST_CELL), Image.Resampling.LANCZOS)
        self.images[index] = small

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, title: str) -> Image.Image:
        """The sheet; the cell of an image that failed is empty."""
        grid = self.grid(title)
        return contact_sheet(
            [[self.images.get(index) for index in row] for row in grid.cells], grid.rows, grid.columns, grid.title
        )

    def grid(self, title: str) -> Grid:
        """The order of the sheet."""
        seeds = {spec.seed for spec in self.rows}
        if len(seeds) == 1:
            title = f"{title}, seed {seeds.pop()}"
        if self.columns[0].multipliers is None:
            return self._prompts_by_seeds(title)
        cells = [[column * len(self.rows) + row for column in range(len(self.columns))] for row in range(len(self.rows))]
        labels = [f"seed {spec.seed}: {spec.prompt}" if seeds else spec.prompt for spec in self.rows]
        return Grid(title, [column.label for column in self.columns], labels, cells)

    def _prompts_by_seeds(self, title: str) -> Grid:
        """Without networks: a row for each prompt, a column for each seed."""
        numbers: dict[tuple[str, str], list[int]] = {}
        for number, spec in enumerate(self.rows):
            numbers.setdefault((spec.prompt, spec.negative_prompt), []).append(number)
        seeds = [[self.rows[number].seed for number in row] for row in numbers.values()]
        alike = all(row == seeds[0] for row in seeds)
        labels = [
            prompt if alike else f"seeds {', '.join(map(str, row))}: {prompt}"
            for (prompt, _), row in zip(numbers, seeds, strict=True)
        ]
        heads = [f"seed {seed}" for seed in seeds[0]] if alike and len(seeds[0]) > 1 else []
        return Grid(title, heads, labels, list(numbers.values()))
