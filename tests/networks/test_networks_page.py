"""docs/networks.md says what the code says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from networks import dylora, lora, lora_args

PAGE = (Path(__file__).parents[2] / "docs" / "networks.md").read_text(encoding="utf-8")
DYLORA = PAGE[PAGE.index("## DyLoRA") : PAGE.index("## Modules of others")]


def lines(start: str) -> list[str]:
    return re.findall(rf"^{re.escape(start)}.*$", PAGE, re.MULTILINE)


def test_every_key_is_in_the_tables_and_no_other():
    for text, readers in ((PAGE[: PAGE.index("## DyLoRA")], lora_args.readers()), (DYLORA, dylora.READERS)):
        cells = [
            line.split("|")[1] for line in text.splitlines() if line.startswith("| `") and "networks." not in line.split("|")[1]
        ]
        assert {key for cell in cells for key in re.findall(r"`(\w+)`", cell)} - {"kohya"} == set(readers) | set()


@pytest.mark.parametrize("line", lines("--network_args"))
def test_the_commands_of_networks_lora_work(model, line):
    words = dict(word.split("=", 1) for word in shlex.split(line)[1:])
    assert lora.create_network(1.0, 4, 1.0, None, model.text_encoder, model.unet, **words).loras


@pytest.mark.parametrize("line", lines("--network_module=networks.dylora"))
def test_the_commands_of_dylora_work(model, line):
    options, arguments = line.split("--network_args")
    given = dict(option.removeprefix("--").split("=") for option in options.split())
    words = dict(word.split("=", 1) for word in shlex.split(arguments))
    dim, alpha = int(given["network_dim"]), float(given.get("network_alpha", 1))
    network = dylora.create_network(1.0, dim, alpha, None, model.text_encoder, model.unet, **words)
    assert (network.rank, network.unit) == (dim, int(words["unit"]))


def test_the_pages_that_are_linked_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (Path(__file__).parents[2] / "docs" / target).exists(), target
