"""docs/gen_img_README*.md: every command runs, and the tables say what the code says.

Commands run as they are printed, in a folder that has the files they name, with the words of `SMALL` added, which only make them
small and fit for a machine without a GPU.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from user_pages import blocks, read_page

from library.command_line import groups_of, is_flag
from library.diffusion.samplers import SAMPLERS
from library.errors import UserError
from library.generation import session
from library.generation.options import GenerateOptions, parse_options
from library.generation.prompts.inline import OPTIONS as INLINE_OPTIONS
from library.generation.prompts.written import WrittenPrompt
from library.generation.unsupported_options import UNSUPPORTED, UNSUPPORTED_INLINE
from library.models.saving import save_stable_diffusion
from library.testing import small_sdxl

FILES = ("docs/gen_img_README.md", "docs/gen_img_README-zh.md", "README.md")
PAGES = {name: read_page(name) for name in FILES}
ENGLISH, CHINESE, README = PAGES["docs/gen_img_README.md"], PAGES["docs/gen_img_README-zh.md"], PAGES["README.md"]
BOTH = pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])
FIELDS = {name: field for group in groups_of(GenerateOptions).values() for name, field in group.model_fields.items()}

# A later word beats an earlier one; source images keep their size.
SMALL = ["--steps=1", "--W=64", "--H=64", "--no_preview"]
SMALL_HIGHRES = ["--highres_fix_steps=1", "--W=128", "--H=128"]
NEEDS_GPU = {"--fp16"}


def commands(page: str) -> list[str]:
    lines = (line for _, content in blocks(page) for line in content.splitlines())
    return [line for line in lines if line.startswith("python gen_img_diffusers.py")]


COMMANDS = list(dict.fromkeys(command for page in PAGES.values() for command in commands(page)))


@pytest.fixture
def work_folder(gen_files, tmp_path, monkeypatch, shared_models) -> Path:
    """A folder with every file that the page's commands name."""
    folder = tmp_path / "project"
    shutil.copytree(gen_files, folder)
    for name in ("0004", "0008"):
        shutil.copy(folder / "out" / "mine.safetensors", folder / f"split-{name}.safetensors")
    width = 32
    save_file({"emb_params": torch.ones(2, width)}, folder / "mytoy.safetensors")
    save_stable_diffusion(small_sdxl(), folder / "sdxl.safetensors")
    (folder / "photos").mkdir()
    Image.new("RGB", (70, 64), "green").save(folder / "photos" / "cat.png")
    Image.new("L", (70, 64), 255).save(folder / "mask.png")
    regions = Image.new("RGB", (64, 64), (255, 0, 0))
    regions.paste((0, 255, 0), (0, 0, 32, 64))
    regions.save(folder / "regions.png")
    prompts = next(content for _, content in blocks(ENGLISH) if content.startswith("# prompts.txt"))
    (folder / "prompts.txt").write_text(re.sub(r"--([wh]) \d+", r"--\1 64", prompts).replace("--s 28", "--s 1"), encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n# none\na dog\n"))
    lines = iter(["a cat", "a dog --q 1"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))
    return folder


def made_small(words: list[str]) -> list[str]:
    if not torch.cuda.is_available():
        words = [word for word in words if word not in NEEDS_GPU]
    given = " ".join(words)
    more = ["--steps=1", "--no_preview"] if "--image_path" in given else [*SMALL]
    more += SMALL_HIGHRES if "--highres_fix_scale" in given else []
    more += ["--seed=1"] if "--sheet" in words else []
    more += ["--n_iter=1", "--images_per_prompt=2"] if "--n_iter" in given else []
    return [*words, *more]


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_every_command_runs(command, work_folder, capsys):
    words = shlex.split(command)[2:]
    if words == ["--help"]:
        with pytest.raises(SystemExit) as end:
            parse_options(words)
        assert end.value.code == 0 and "--network_weights" in capsys.readouterr().out
        return
    parse_options(words)  # as it stands
    options = parse_options(made_small(words))
    assert session.run(options) == 0
    folder = Path(options.output.outdir)
    assert [path for path in folder.glob("*.png") if not path.name.startswith("sheet_")]
    assert len(list(folder.glob("sheet_*.png"))) == options.output.sheet


def test_the_commands_are_seen():
    assert len(COMMANDS) >= 18 and sum(README.count(command) for command in commands(README)) >= 1
    assert ENGLISH.count("python gen_img_diffusers.py --") == len(commands(ENGLISH)) + 1  # one is in the text


def test_the_variants_of_the_page_are_variants():
    builder = session.RequestBuilder(parse_options(["--ckpt=m", "--prompt=a"]))
    rows = re.findall(r"^\| `(\{.*?\})` \| ", ENGLISH, re.MULTILINE)
    assert len(rows) == 6
    made = [len(builder.build([WrittenPrompt(row.replace("\\|", "|"), row)])) for row in rows]
    assert made == [1, 1, 1, 1, 3, 3] and not builder.problems


# ---------------------------------------------------------------- tables

OPTIONS, DIFFERENCES, TROUBLE = -3, -2, -1  # the last chapters


def chapter(page: str, number: int) -> str:
    return page.split("\n## ")[number]


@BOTH
def test_every_option_is_in_the_tables_with_its_default(page):
    rows = re.findall(r"^\| `--(\w+)` \| ([^|]+) \| (.+) \|$", chapter(page, OPTIONS), re.MULTILINE)
    assert [row[0] for row in rows] == list(FIELDS)
    for name, default, meaning in rows:
        value = FIELDS[name].get_default()
        wanted = ("off", "关") if is_flag(FIELDS[name]) else ("none", "无") if value is None else (f"`{value}`",)
        assert default in wanted and meaning, name


@BOTH
def test_every_in_line_option_and_sampler_is_named(page):
    table = "".join(re.findall(r"^\| (`--.*?) \|", page.split("\n## ")[3], re.MULTILINE))
    assert set(re.findall(r"--(\w+)", table)) == set(INLINE_OPTIONS)
    assert all(f"`{name}`" in page for name in SAMPLERS)


@BOTH
def test_refused_options_are_in_the_tables(page):
    cells = re.findall(r"^\| (`[\w-]+`(?:, `[\w-]+`)*) \| ", chapter(page, DIFFERENCES), re.MULTILINE)
    rows = [re.findall(r"`([\w-]+)`", names) for names in cells]
    expected = []
    for reasons, mark in ((UNSUPPORTED.reasons, ""), (UNSUPPORTED_INLINE, "--")):
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).append(mark + name)
        expected += by_reason.values()
        assert page is CHINESE or all(f"| {reason} |" in page for reason in by_reason)
    assert rows == expected


@BOTH
def test_every_option_that_is_mentioned_exists(page):
    mentioned = set(re.findall(r"(?<![\w-])--([a-zA-Z]\w*)", page)) - {"network_weigth", "help", "sample_prompts", "q"}
    mentioned -= {"max_token_length"}  # of training
    assert mentioned - set(FIELDS) - set(UNSUPPORTED.reasons) - set(INLINE_OPTIONS) - set(UNSUPPORTED_INLINE) == set()


# ---------------------------------------------------------------- what can go wrong

ERRORS = {  # the message's beginning as the pages have it -> words that bring it about
    "unknown option '--network_weigth'": ["--network_weigth=x"],
    "--control_net_models is not supported": ["--control_net_models", "x"],
    "--ckpt is missing": ["--ckpt="],
    "no prompts: ": [],
    "there is no file or folder": ["--ckpt=nothing.safetensors", "--prompt=a"],
    "... is an SD 1.x model": ["--v2", "--prompt=a"],
    "--network_weights ...: there is no such file": ["--network_weights", "nothing.safetensors", "--prompt=a"],
    "--network_weights ...: the weights": ["--network_weights", "wide.safetensors", "--prompt=a"],
    "--network_mul has 2 values": ["--network_weights", "out/mine.safetensors", "--network_mul", "1", "0.5", "--prompt=a"],
    "--W: expected": ["--W=500", "--prompt=a"],
    "--steps: expected": ["--steps=0", "--prompt=a"],
    "--prompt, column 7": ["--prompt=a cat --w 500"],
    "--fp16 needs a GPU": ["--fp16", "--prompt=a"],
    "--outdir ...": ["--outdir=mask.png", "--prompt=a"],
}


def messages(page: str) -> list[str]:
    return re.findall(r"^\| `(.+?)` \| ", chapter(page, TROUBLE), re.MULTILINE)


@BOTH
def test_messages_are_those_that_are_tested(page):
    found = messages(page)
    assert len(found) == len(ERRORS)
    assert all(message.startswith(start) for message, start in zip(found, ERRORS, strict=True))


@pytest.mark.parametrize("start", ERRORS)
def test_the_program_says_so(start, work_folder):
    if "fp16" in start and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 1280), f"{name}.lora_up.weight": torch.ones(1280, 2)}
    save_file(tensors, work_folder / "wide.safetensors")
    message = next(m for m in messages(ENGLISH) if m.startswith(start))
    with pytest.raises(UserError) as error:
        session.run(parse_options(["--ckpt=model.safetensors", *ERRORS[start]]))
    assert re.search(".*".join(re.escape(part) for part in message.split("...")), str(error.value))
    assert "\n" not in str(error.value)
