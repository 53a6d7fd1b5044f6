"""`sheet_<time>.html`: the sheet of --sheet as a page, with prompt and settings of each image, which opens in full size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.generation.outputs.comparison import Column, Comparison
from library.generation.prompts.spec import PromptSpec
from library.pages.images import save_small_copy
from library.pages.page import folder_of, write_page


def write_sheet_page(comparison: Comparison, model: str, path: Path) -> None:
    """Write the page at `path`, in the folder of the images, and small copies of them beside it.

    Raises UserError if the page cannot be written.
    """
    folder = folder_of(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_page(path, "sheet", f"{model}: {path.stem}", {
        "model": model,
        "specs": [spec_facts(spec) for spec in comparison.rows],
        "networks": None if comparison.columns[0].multipliers is None else [network_name(one) for one in comparison.columns],
        "cells": [[cell(comparison, index, folder) for index in row] for row in comparison.grid("").cells],
    })  # fmt: skip


def spec_facts(spec: PromptSpec) -> dict[str, Any]:
    """Prompt and settings of the images of one row."""
    return {
        "prompt": spec.prompt, "negative": spec.negative_prompt, "seed": spec.seed, "steps": spec.steps, "scale": spec.scale,
        "sampler": spec.sampler,
    }  # fmt: skip


def network_name(column: Column) -> str | None:
    """A network and its strength; None for the model alone."""
    return column.label if column.multipliers and any(column.multipliers) else None


def cell(comparison: Comparison, index: int, folder: Path) -> dict[str, Any]:
    """One image, of which a copy is written to `folder`; `copy` is None if there is none."""
    network, spec = divmod(index, len(comparison.rows))
    found: dict[str, Any] = {"spec": spec, "network": network, "copy": None}
    if (image := comparison.images.get(index)) is not None:
        save_small_copy(image, folder / f"{index:04d}.webp", max(image.size))
        found |= {"copy": f"{folder.name}/{index:04d}.webp", "size": list(image.size)}
        if index in comparison.files:
            found["file"] = comparison.files[index].name
    return found
