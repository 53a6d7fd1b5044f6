"""The command lines of the LoRA tools."""

from __future__ import annotations

import importlib
import unicodedata
from pathlib import Path

import pytest

from library.errors import UserError
from library.tools.command import Parser, path_text


def test_negative_numbers_in_any_notation_are_values_and_no_options():
    parser = Parser("x")
    parser.add_argument("--ratios", nargs="*", type=float)
    parser.add_argument("--lbw", nargs="*")
    args = parser.parse_args(
        ["--ratios", "-.5", "-5e-1", "-1E-3", "-2.", "-1_0", "0.5", "-inf", "--lbw", "-1,0.5,-1e-2", "-0.5,1"]
    )
    assert args.ratios == [-0.5, -0.5, -0.001, -2.0, -10.0, 0.5, float("-inf")]
    assert parser.parse_args(["--ratios", "\u22120.5", "\u2013.5", "0.5"]).ratios == [-0.5, -0.5, 0.5]  # of web pages
    joined = parser.parse_args(["--ratios=\u2212.5", "--lbw=1,\u22125e\u22121"])
    assert joined.ratios == [-0.5] and joined.lbw == ["1,-5e-1"]
    assert args.lbw == ["-1,0.5,-1e-2", "-0.5,1"]
    with pytest.raises(UserError, match="did you mean '--ratios'"):
        parser.parse_args(["--ratio", "-.5"])


def test_paths_are_found_in_either_form_of_an_accent_and_are_not_empty(tmp_path):
    parser = Parser("x")
    parser.add_argument("--models", nargs="*", type=path_text)
    composed, decomposed = (str(tmp_path / unicodedata.normalize(form, "caf\u00e9.pt")) for form in ("NFC", "NFD"))
    Path(decomposed).touch()
    found = parser.parse_args(["--models", composed, decomposed, str(tmp_path / "n\u00e9w.pt"), "a//b"]).models
    assert all(Path(path).exists() for path in found[:2]) and found[2:] == [str(tmp_path / "n\u00e9w.pt"), "a//b"]
    with pytest.raises(UserError, match="--models: an empty path; give one, or leave the option out"):
        parser.parse_args(["--models", "a", " "])


TOOLS = (
    "networks.check_lora_weights", "networks.extract_lora_from_dylora", "networks.extract_lora_from_models",
    "networks.merge_lora", "networks.resize_lora", "networks.svd_merge_lora", "tools.convert_diffusers20_original_sd",
    "tools.resize_images_to_resolution",
)  # fmt: skip
PATHS = {
    "file", "model", "models", "model_org", "model_tuned", "sd_model", "save_to", "model_to_load", "model_to_save", "vae",
    "src_img_folder", "dst_img_folder",
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_every_path_of_a_tool_is_read_so(tool):
    actions = importlib.import_module(tool).options()._actions
    found = {action.dest for action in actions if action.dest in PATHS}
    assert found and found == {action.dest for action in actions if action.type is path_text}
