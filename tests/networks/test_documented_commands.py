"""The commands in the tools' pages run as written, and the pages name every option."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest
import torch
from tool_files import NETWORK_TOOLS, checkpoint_tensors, lora_tensors, save_lora, small_model

DOCS = Path(__file__).parents[2] / "docs"
LORA_TOOLS = [tool for tool in NETWORK_TOOLS if tool != "sdxl_merge_lora"]  # merge_lora by another name, with no page of its own
TOOLS = {tool: f"networks.{tool}" for tool in LORA_TOOLS}
TOOLS |= {tool: f"tools.{tool}" for tool in ("resize_images_to_resolution", "convert_diffusers20_original_sd")}


def test_the_tools_are_found():
    assert {"merge_lora", "sdxl_merge_lora", "check_lora_weights"} < set(NETWORK_TOOLS)


def commands(tool: str) -> list[list[str]]:
    lines = (DOCS / f"{tool}.md").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python ")]


@pytest.mark.parametrize("tool", LORA_TOOLS)
def test_commands_run_as_written(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small_model()
    tensors = checkpoint_tensors(model, torch.float16)
    tuned = {name: value * 1.01 if "attn1" in name else value for name, value in tensors.items()}
    for name, content in {"model.ckpt": tensors, "base.ckpt": tensors, "tuned.ckpt": tuned}.items():
        torch.save({"state_dict": content}, name)
    for seed, name in enumerate(("a", "b", "lora", "big")):
        save_lora(Path(f"{name}.safetensors"), lora_tensors(model, 8, seed=seed, only="mid_block"))
    save_lora(Path("dylora.safetensors"), lora_tensors(model, 8, only="mid_block"))
    assert commands(tool)
    for _, script, *words in commands(tool):
        assert script == f"networks/{tool}.py"
        if not torch.cuda.is_available():
            words = ["cpu" if word == "cuda" else word for word in words]
        importlib.import_module(TOOLS[tool]).main(words)
        if "--save_to" in words:
            target = Path(words[words.index("--save_to") + 1])
            assert target.exists() or list(Path().glob(f"{target.stem}-*"))


@pytest.mark.parametrize("tool", TOOLS)
def test_every_option_is_in_the_page(tool):
    page = (DOCS / f"{tool}.md").read_text(encoding="utf-8")
    parser = importlib.import_module(TOOLS[tool]).options()
    options = {name for name in parser._option_string_actions if name.startswith("--")} - {"--help"}
    assert not [option for option in options if f"`{option}" not in page and f" {option}" not in page]
