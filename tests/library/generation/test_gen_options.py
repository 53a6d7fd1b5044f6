"""The command line of gen_img_diffusers.py against the reference list of options."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from library.command_line import choices_of, groups_of, is_flag, is_list, option_names
from library.errors import UserError
from library.generation.options import GenerateOptions, parse_options
from library.generation.unsupported_options import UNSUPPORTED

ROOT = Path(__file__).parents[3]
NEEDED = ["--ckpt=m", "--prompt=a cat"]
FIELDS = {name: field for group in groups_of(GenerateOptions).values() for name, field in group.model_fields.items()}
# What must be given so that the option may be given at all.
COMPANIONS = {
    "from_file": [],
    **{name: ["--image_path=p"] for name in ("use_original_file_name", "strength", "mask_path")},
    "highres_fix_strength": ["--highres_fix_scale=0.5", "--image_path=p"],
    "highres_fix_upscaler_args": ["--highres_fix_scale=0.5", "--highres_fix_upscaler=m"],
    **{name: ["--network_weights", "a"] for name in FIELDS if name.startswith("network_")},
    **{f"highres_fix_{name}": ["--highres_fix_scale=0.5"] for name in ("steps", "save_1st", "latents_upscaling", "upscaler")},
}  # fmt: skip
COMPANIONS["network_weights"] = []
COMPANIONS["network_regional_mask_max_color_codes"] = ["--network_weights", "a", "--mask_path=m"]
EXAMPLES = {"int": ("64", 64), "float": ("0.5", 0.5), "str": ("word", "word")}
SPECIAL = {"seed": ("64", (64,)), "network_merge_n_models": ("1", 1), "ds_depth_1": ("2", 2), "ds_depth_2": ("2", 2)}


def rows() -> list[dict[str, str]]:
    with open(ROOT / "tests/data/options-gen_img_diffusers.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def value_of(options: GenerateOptions, name: str) -> typing.Any:
    return getattr(getattr(options, option_names(GenerateOptions)[name]), name)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["option"])
def test_every_option_of_the_reference_is_taken_or_refused_by_name(row):
    name = row["option"][2:]
    assert (name in FIELDS) != (name in UNSUPPORTED.reasons)
    if name in UNSUPPORTED.reasons:
        with pytest.raises(UserError, match=f"--{name} is not supported: .{{20,}}"):
            parse_options([*NEEDED, f"--{name}", "1"])
        return
    field = FIELDS[name]
    assert is_flag(field) == (row["type"] == "flag")
    assert is_list(field) == (row["nargs"] == "*")
    needed = [word for word in NEEDED if name != "from_file" or "prompt" not in word]
    words = [*needed, *COMPANIONS.get(name, [])]
    default = value_of(parse_options([*words, *(["--prompt=a"] if name == "from_file" else [])]), name)
    if name not in ("ckpt", "prompt"):
        wanted = {"None": None, "False": False}.get(row["default"], row["default"])
        assert default == (type(default)(wanted) if wanted not in (None, False) else wanted)
    if row["type"] == "flag":
        assert value_of(parse_options([*words, f"--{name}"]), name) is True
        return
    assert choices_of(field) == tuple(row["choices"].split("|") if row["choices"] else ())
    for choice in choices_of(field):
        assert value_of(parse_options([*words, f"--{name}", choice]), name) == choice
    if not row["choices"]:
        text, value = SPECIAL.get(name, EXAMPLES[row["type"]])
        assert value_of(parse_options([*words, f"--{name}", text]), name) == ([value] if row["nargs"] else value)
    if row["type"] in ("int", "float") and name != "seed":
        with pytest.raises(UserError, match=rf"--{name}: expected .*'many'"):
            parse_options([*words, f"--{name}", "many"])


def test_every_option_of_sdxl_is_taken_or_refused_by_name():
    text = (ROOT / "tests/data/options-sdxl_gen_img.csv").read_text(encoding="utf-8")
    names = {name for row in csv.DictReader(text.splitlines()) for name in re.findall(r"--(\w+)", row["option"])}
    assert len(names) > 35 and [name for name in sorted(names) if (name in FIELDS) == (name in UNSUPPORTED.reasons)] == []
    sizes = parse_options([*NEEDED, "--original_width=2048", "--original_height_negative=8", "--crop_top=0"]).sizes
    assert (sizes.original_width, sizes.original_height, sizes.original_height_negative, sizes.crop_top) == (2048, None, 8, 0)
    with pytest.raises(UserError, match="--original_width: expected greater than or equal to 1"):
        parse_options([*NEEDED, "--original_width=0"])


def test_unknown_options_name_the_nearest_one():
    with pytest.raises(UserError, match="unknown option '--network_weigth'; did you mean '--network_weights'?"):
        parse_options([*NEEDED, "--network_weigth=x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt=a"], "--ckpt is missing"),
        (["--ckpt=m"], "no prompts: give --prompt, --from_file or --interactive"),
        ([*NEEDED, "--from_file=f"], "--prompt and --from_file exclude each other"),
        (["--ckpt=m", "--from_file=-", "--interactive"], "both read standard input"),
        ([*NEEDED, "--W=500"], "--W: expected a multiple of 8"),
        ([*NEEDED, "--H=0"], "--H: expected greater than or equal to 64"),
        ([*NEEDED, "--steps=0"], "--steps: expected greater than or equal to 1"),
        ([*NEEDED, "--steps=1001"], "--steps: expected less than or equal to 1000"),
        ([*NEEDED, "--sampler=eular"], "--sampler: expected 'ddim', "),
        ([*NEEDED, "--seed=1,x"], "--seed: expected a whole number from 0 to"),
        ([*NEEDED, "--seed=-1"], "--seed: expected a whole number from 0 to"),
        ([*NEEDED, "--scale=nan"], "--scale: expected a finite number"),
        ([*NEEDED, "--batch_size=0"], "--batch_size: expected greater than or equal to 1"),
        ([*NEEDED, "--fp16", "--bf16"], "--fp16 and --bf16 exclude each other"),
        ([*NEEDED, "--network_weights", "a", "--network_mul", "1", "0.5"], "--network_mul has 2 values for 1 file"),
        ([*NEEDED, "--network_module", "m"], "--network_module needs --network_weights"),
        ([*NEEDED, "--network_weights", "a", "b", "c", "--network_module", "m", "n"], "--network_module has 2 names for 3 files"),
        (
            [*NEEDED, "--network_weights", "a", "--network_merge_n_models=2"],
            "_n_models 2 is more than --network_weights has; give at most 1",
        ),
        ([*NEEDED, "--strength=0.5"], "--strength needs --image_path or --highres_fix_scale"),
        ([*NEEDED, "--mask_path=m"], "--mask_path needs --image_path .* or --network_weights"),
        ([*NEEDED, "--mask_path=m", "--network_weights", "a", "--network_merge"], "--mask_path .* cannot be merged"),
        ([*NEEDED, "--image_path=p", "--W=64"], "--image_path takes .* both --W and --H"),
        ([*NEEDED, "--use_original_file_name"], "--use_original_file_name needs --image_path"),
        ([*NEEDED, "--sheet_strengths", "1"], "--sheet_strengths needs --sheet; --sheet_strengths needs --network_weights"),
        ([*NEEDED, "--sheet", "--n_iter=2"], "--sheet draws the list once"),
        ([*NEEDED, "--sheet", "--network_weights", "a", "--network_merge"], "--sheet compares networks one by one"),
        ([*NEEDED, "--network_pre_calc"], "--network_pre_calc needs --network_weights or --lora_dir"),
        ([*NEEDED, "--highres_fix_steps=20"], "--highres_fix_steps needs --highres_fix_scale"),
        ([*NEEDED, "--highres_fix_save_1st"], "--highres_fix_save_1st needs --highres_fix_scale"),
    ],
)
def test_what_does_not_fit_together_ends_in_one_line(words, message):
    with pytest.raises(UserError, match=message) as error:
        parse_options(words)
    assert "\n" not in str(error.value)


def test_trap_6_4_control_net_preparation_is_refused_by_name():
    with pytest.raises(UserError, match="--control_net_preps is not supported: ControlNet is not built"):
        parse_options([*NEEDED, "--control_net_preps", "canny"])


def test_trap_6_1_the_script_starts_and_its_help_imports_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['gen_img_diffusers.py', '--help']\n"
        "try:\n    runpy.run_path('gen_img_diffusers.py', run_name='__main__')\n"
        "except SystemExit as end:\n    sys.exit(end.code or int('torch' in sys.modules or 'diffusers' in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60)
    assert result.returncode == 0, result.stderr
    assert set(re.findall(r"^  --(\w+)", result.stdout, re.MULTILINE)) == set(FIELDS)


def test_an_empty_path_is_an_option_that_is_not_given():
    options = parse_options([*NEEDED, "--vae=", "--outdir=", "--from_file=", "--network_weights", ""])
    assert (options.model.vae, options.output.outdir, options.network.network_weights) == (None, "outputs", None)
    with pytest.raises(UserError, match="--ckpt is missing"):
        parse_options(["--ckpt=", "--prompt=a"])
