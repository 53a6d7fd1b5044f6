"""The user pages: every command and code block in them runs, and their tables say what the code says.

Commands run as they are printed, in a folder that has the files they name (a small model, a few small images), with the
words of `SMALL` added, which only make them small and fit for a machine without a GPU.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from user_pages import DOCS, ROOT, blocks, read_page

import train_network
from library.command_line import choices_of, groups_of, is_flag, option_names
from library.data.config import datasets_from_file
from library.data.config_keys import DatasetDefaults
from library.diffusion.samplers import SAMPLERS
from library.errors import UserError
from library.generation.options import GenerateOptions
from library.generation.prompts.prompt_file import read_prompt_file
from library.generation.prompts.spec import PromptSpec
from library.models.saving import save_stable_diffusion
from library.testing import small_stable_diffusion
from library.training import entry, machine
from library.training.checks.unsupported_options import UNSUPPORTED
from library.training.optimization.optimizers import OPTIMIZERS
from library.training.optimization.schedules import SCHEDULES
from library.training.options import LogOptions, TrainNetworkOptions, parse_options
from library.training.outputs import summary
from library.training.outputs.trackers import tracker_settings
from networks.lora import create_network
from networks.lora_args import readers
from tests.library.training.small_runs import read_tokenizers_once

# The pages of the tools have tests of their own (tests/networks/test_documented_commands.py).
FILES = ["README.md", "docs/speed.md", *(f"docs/{path.name}" for path in sorted(DOCS.glob("train_*.md")))]
PAGES = {name: read_page(name) for name in FILES}
ENGLISH, CHINESE = PAGES["docs/train_network_README.md"], PAGES["docs/train_network_README-zh.md"]
BOTH = pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])

# The overrides: what is added to each training command. A later word beats an earlier one; a dataset file beats --resolution.
SMALL = [
    "--max_train_steps=1", "--resolution=64", "--min_bucket_reso=64", "--mixed_precision=no", "--max_data_loader_n_workers=0",
]  # fmt: skip
SMALL_IF_GIVEN = {"max_train_epochs": "--max_train_epochs=1"}
# The same for dataset files, sample prompts and Python.
SMALL_TEXT = {
    "resolution = 512": "resolution = 64", "num_repeats = 10": "num_repeats = 1",
    "=512": "=64", "num_inference_steps=25": "num_inference_steps=2",
}  # fmt: skip

# Set-up, which tests/test_quickstart.py is about, and programs of others.
NOT_RUN = (
    r"git clone \S.*", r"python3? quickstart\.py( test)?", r"python3? -m venv \S+", r"\S*pip3? install .*",
    r"tensorboard --logdir=logs",
    r"python gen_img_diffusers\.py .*",  # tests/library/generation/script/test_gen_docs.py
    r"python tools/doctor\.py .*",  # minutes: tests/library/doctor
)  # fmt: skip
PROGRAMS = ("accelerate", "python", "python3", "py", "pip", "git", "tensorboard", ".venv/bin/pip")


def commands(page: str) -> list[str]:
    """The command lines of a page: all lines of shell blocks; in blocks without a language those that begin with a program."""
    found = []
    for language, content in blocks(page):
        shell = language in ("bash", "sh", "console", "powershell")
        for line in re.sub(r"[\\`]\n\s*", " ", content).splitlines():
            line = re.sub(r"^(\$|PS>) ", "", line.strip())
            if line and not line.startswith("#") and (shell or not language and line.split()[0] in PROGRAMS):
                found.append(line)
    return found


ALL_COMMANDS = list(dict.fromkeys(command for page in PAGES.values() for command in commands(page)))
RUN = [command for command in ALL_COMMANDS if not any(re.fullmatch(pattern, command) for pattern in NOT_RUN)]
PYTHON = list(dict.fromkeys(content for page in PAGES.values() for language, content in blocks(page) if language == "python"))


def named_block(name: str) -> str:
    """The block whose first line is a comment with this file name."""
    return next(content for _, content in blocks(ENGLISH) if re.match(rf"# {re.escape(name)}\b", content))


def small_text(text: str) -> str:
    for large, small in SMALL_TEXT.items():
        text = text.replace(large, small)
    return text


LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]  # = accelerate launch


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with every file that the pages' commands name."""
    folder = tmp_path_factory.mktemp("docs")
    model = small_stable_diffusion(unet_channels=(32, 64), vae_channels=(32, 32, 32, 32), text_width=32, text_layers=1)
    save_stable_diffusion(model, folder / "model.safetensors")
    save_stable_diffusion(model, folder / "model")
    (folder / "broken.safetensors").write_text("no model", encoding="utf-8")
    (folder / "page.safetensors").write_text("<!DOCTYPE html><html>not found</html>", encoding="utf-8")
    (folder / "images" / "cat").mkdir(parents=True)
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(folder / "images" / "cat" / f"{name}.png")
        (folder / "images" / "cat" / f"{name}.txt").write_text(f"sks cat, {name}", encoding="utf-8")
    for name in ("data.toml", "settings.toml"):
        (folder / name).write_text(small_text(named_block(name)), encoding="utf-8")
    (folder / "prompts.txt").write_text("sks cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    lora = create_network(1.0, 4, 4.0, model.vae, model.text_encoders[0], model.denoiser)
    lora.save_weights(
        folder / "out" / "mine.safetensors",
        None,
        {"ss_seed": "1", "ss_network_module": "networks.lora", "ss_dataset_dirs": '{"cat": {"n_repeats": 1, "img_count": 2}}'},
    )
    return folder


@pytest.fixture
def work_folder(prepared, tmp_path, monkeypatch) -> Path:
    """A fresh copy of these files as the current folder. Runs in this process draw no loss plot."""
    folder = tmp_path / "project"
    shutil.copytree(prepared, folder, copy_function=link_weights)
    monkeypatch.chdir(folder)
    read_tokenizers_once(monkeypatch.setattr)
    monkeypatch.setattr(summary, "try_loss_plot", lambda *args: "not drawn in tests")
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def link_weights(source: str, target: str) -> None:
    """Nothing writes into a file of weights; new ones take a name when they are whole."""
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


def training_words(command: str) -> tuple[list[str], list[str]] | None:
    """(words before train_network.py, words after it) of a training command."""
    words = shlex.split(command)
    if "train_network.py" not in words:
        return None
    split = words.index("train_network.py")
    return words[:split], words[split + 1 :]


def made_small(words: list[str]) -> list[str]:
    given = {word[2:].split("=")[0] for word in words}
    return [*words, *SMALL, *(extra for name, extra in SMALL_IF_GIVEN.items() if name in given)]


def forget_output(words: list[str], options: TrainNetworkOptions) -> Path:
    """The file that the command is to make, which does not exist yet unless the command reads it too."""
    folder = Path(options.output.output_dir)
    if options.data.debug_dataset:
        return folder / "debug_dataset.png"
    path = folder / f"{options.output.output_name or 'last'}.{options.output.save_model_as}"
    assert str(path.as_posix()) not in " ".join(words), "a command should not write over what it reads"
    path.unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------- commands and code


@pytest.mark.parametrize("command", RUN, ids=range(len(RUN)))
def test_every_command_runs(command, work_folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there: the run goes on
    launch, words = training_words(command) or pytest.fail(f"teach this test to run: {command}")
    assert launch in (["accelerate", "launch", "--num_cpu_threads_per_process", "1"], ["python"])
    if words == ["--help"]:
        with pytest.raises(SystemExit) as end:
            parse_options(words)
        assert end.value.code == 0 and "--network_dim" in capsys.readouterr().out
        return
    if words[0].startswith("--from_metadata="):
        monkeypatch.setattr("sys.argv", ["train_network.py", *words])
        assert train_network.main() == 0 and "--network_module=networks.lora" in capsys.readouterr().out
        return
    parse_options(words)  # as it stands
    options = parse_options(made_small(words))
    expected = forget_output(words, options)
    assert entry.train(options) == 0
    assert expected.stat().st_size > 0
    if expected.suffix == ".safetensors":
        with safe_open(expected, "pt") as file:
            assert file.metadata()["ss_steps"] == "1"
    if options.previews.sample_prompts:
        assert list((expected.parent / "sample").glob("*.png"))


def test_cpu_command_runs_through_the_launcher(work_folder):
    command = next(c for c in commands(ENGLISH) if c.startswith("accelerate launch") and "--mixed_precision=no" in c)
    launch, words = training_words(command)
    expected = forget_output(words, parse_options(words))
    program = [*LAUNCHER, *launch[2:], str(ROOT / "train_network.py"), *made_small(words)]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    result = subprocess.run(program, cwd=work_folder, capture_output=True, encoding="utf-8", env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert expected.stat().st_size > 0 and str(expected) in result.stdout


def test_quiet_launcher_shows_one_line(work_folder):
    program = [*LAUNCHER, "--quiet", str(ROOT / "train_network.py"), "--learning_rat=1"]
    result = subprocess.run(program, cwd=work_folder, capture_output=True, encoding="utf-8", timeout=120)
    assert result.returncode != 0 and "error: unknown option '--learning_rat'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_commands_are_seen():
    assert len(RUN) >= 10 and any("AdamW8bit" in command and "--xformers" in command for command in RUN)
    fenced = [content for page in PAGES.values() for _, content in blocks(page)]
    seen = [command for page in PAGES.values() for command in commands(page)]
    assert sum(content.count("train_network.py --") for content in fenced) == sum("train_network.py --" in c for c in seen)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_code_runs(code, work_folder):
    pytest.importorskip("peft")
    exec(compile(small_text(code), "docs", "exec"), {})


def test_example_files_are_read(work_folder):
    Path("data.toml").write_text(named_block("data.toml"), encoding="utf-8")
    assert datasets_from_file(Path("data.toml"), DatasetDefaults())[0].resolution == (512, 512)
    specs = {}
    for name in ("prompts.txt", "prompts.toml"):
        Path(name).write_text(named_block(name), encoding="utf-8")
        specs[name] = read_prompt_file(Path(name), PromptSpec())
    assert [spec.prompt for spec in specs["prompts.txt"]] == [spec.prompt for spec in specs["prompts.toml"]]
    Path("trackers.toml").write_text(named_block("trackers.toml"), encoding="utf-8")
    assert tracker_settings(LogOptions(log_tracker_config="trackers.toml"))["wandb"]["entity"] == "my-team"
    assert [(s.width, s.height, s.seed, s.steps, s.sampler) for s in specs["prompts.txt"]][1] == (512, 640, 2, 28, "euler_a")


# ---------------------------------------------------------------- tables

OPTIONS, DIFFERENCES, TROUBLE = -3, -2, -1  # the last chapters


def chapter(page: str, number: int) -> str:
    return page.split("\n## ")[number]


@BOTH
def test_every_option_is_in_the_tables_with_its_default(page):
    rows = re.findall(r"^\| `--(\w+)` \| ([^|]+) \| (.+) \|$", chapter(page, OPTIONS), re.MULTILINE)
    assert [row[0] for row in rows] == list(option_names(TrainNetworkOptions))
    fields = {name: field for group in groups_of(TrainNetworkOptions).values() for name, field in group.model_fields.items()}
    for name, default, meaning in rows:
        value = fields[name].get_default()
        if is_flag(fields[name]):
            assert default in ("off", "关"), name
        elif value in (None, ""):
            assert default in ("none", "无"), name
        else:
            assert default == f"`{value}`", name
        if name != "sample_sampler":
            assert all(f"`{choice}`" in meaning for choice in choices_of(fields[name])), name


@BOTH
def test_refused_options_are_in_the_table(page):
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ", chapter(page, DIFFERENCES), re.MULTILINE)
    rows = [re.findall(r"`(\w+)`", names) for names in cells]
    by_reason: dict[str, list[str]] = {}
    for name, reason in UNSUPPORTED.reasons.items():
        by_reason.setdefault(reason, []).append(name)
    assert rows == list(by_reason.values())
    assert page is CHINESE or all(f"| {reason} |" in page for reason in by_reason)


@BOTH
def test_what_can_be_chosen_is_named(page):
    optimizers = {name.lower() for name in re.findall(r"`(\w+)`", page)}
    assert {name.lower() for name in OPTIMIZERS} <= optimizers
    assert all(f"`{name}`" in page for name in (*SCHEDULES, *SAMPLERS, *readers()))


@pytest.mark.parametrize("name", PAGES)
def test_every_option_that_is_mentioned_exists(name):
    of_others = {"num_cpu_threads_per_process", "quiet", "help", "logdir", "num_processes", "steps", "output", "index-url",
                 "self_test", "json"}  # fmt: skip
    of_prompts = {"n", "w", "h", "d", "l", "s", "ss"}
    misspelt = {"learning_rat", "network_al"}  # examples of errors
    mentioned = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)(?!\*|\w)", PAGES[name])) - {"sample_every_n_"}
    known = set(option_names(TrainNetworkOptions)) | set(UNSUPPORTED.reasons) | set(option_names(GenerateOptions))
    assert mentioned - known - of_others - of_prompts - misspelt == set()


# ---------------------------------------------------------------- what can go wrong

BASE = [
    "--pretrained_model_name_or_path=model.safetensors", "--dataset_config=data.toml", "--output_dir=out", "--output_name=new",
    "--network_module=networks.lora", "--learning_rate=1e-4", *SMALL,
]  # fmt: skip
ERRORS = {  # the message's beginning as the pages have it -> words that bring it about
    "unknown option '--learning_rat'": ["--learning_rat=1e-4"],
    "unexpected word 'cat'": ["--train_data_dir=my", "cat"],
    "--cpu_offload_checkpointing is not supported": ["--cpu_offload_checkpointing"],
    "there is no file or folder": ["--pretrained_model_name_or_path=nothing.safetensors"],
    "... is no file of weights": ["--pretrained_model_name_or_path=broken.safetensors"],
    "... is a web page": ["--pretrained_model_name_or_path=page.safetensors"],
    "... is an SD 1.x model": ["--v2"],
    "--network_module network.lora": ["--network_module=network.lora"],
    "unknown network_args key": ["--network_args", "conv_dm=4"],
    "--mixed_precision fp16 needs a GPU": ["--mixed_precision=fp16"],
    "--optimizer_type Lion needs": ["--optimizer_type=Lion"],
    "--lr_scheduler reduce_lr_on_plateau needs": ["--lr_scheduler=reduce_lr_on_plateau"],
    "--lr_warmup_steps has no place": ["--lr_warmup_steps=1"],
    "random_crop of the subset": ["--cache_latents", "--random_crop"],
    "... has rank 4 in the weights": ["--network_weights=out/mine.safetensors", "--network_dim=8"],
    "--sample_every_n_epochs,": ["--sample_every_n_steps=1"],
    "--sample_prompts nothing.txt": ["--sample_prompts=nothing.txt", "--sample_at_first"],
    "--resume nowhere": ["--resume=nowhere"],
    "--early_stopping_patience needs": ["--early_stopping_patience=1"],
    "the loss is nan at step": ["--learning_rate=1e30", "--max_train_steps=4"],
}
NOTES = {
    "--learning_rate is 2e-6": ["--learning_rate=2e-6"],
    "given, but without effect: ": ["--log_prefix=a"],
    "this processor has no bf16 units": ["--mixed_precision=bf16"],
    "--xformers: ": ["--xformers"],
    "no image has a .caption file": ["--train_data_dir=images", "--dataset_config="],
}


def messages(page: str, section: int) -> list[str]:
    """The messages of the tables in the last chapter: 0 the errors, 1 the notes."""
    tables = re.findall(r"(?:^\|.*\n)+", chapter(page, TROUBLE), re.MULTILINE)
    return re.findall(r"^\| `(.+?)` \| ", tables[section], re.MULTILINE)


@BOTH
def test_messages_are_those_that_are_tested(page):
    for section, tested in enumerate((ERRORS, NOTES)):
        found = messages(page, section)
        assert len(found) == len(tested)
        assert all(message.startswith(start) for message, start in zip(found, tested, strict=True))


def as_pattern(message: str) -> re.Pattern:
    return re.compile(".*".join(re.escape(part) for part in message.split("...")))


@pytest.mark.parametrize("start", ERRORS)
def test_the_program_says_so(start, work_folder, monkeypatch):
    if "fp16" in start and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)  # not installed
    message = next(m for m in messages(ENGLISH, 0) if m.startswith(start))
    with pytest.raises(UserError) as error:
        entry.train(parse_options([*BASE, *ERRORS[start]]))
    assert as_pattern(message).search(str(error.value))
    assert not Path("out/new.safetensors").exists()


@pytest.mark.parametrize("start", NOTES)
def test_the_program_notes_so(start, work_folder, monkeypatch, capfd, caplog):
    if torch.cuda.is_available() and start != "no image has a .caption file":
        pytest.skip("there is a GPU")
    monkeypatch.setattr(machine, "cpu_has_fast_bf16", lambda: False)
    message = next(m for m in messages(ENGLISH, 1) if m.startswith(start))
    words = [word for word in BASE if "dataset_config" not in word or "--dataset_config=" not in NOTES[start]]
    words += [word for word in NOTES[start] if word != "--dataset_config="]
    with pytest.raises(UserError):  # weights that are none end the run, so that it is short
        entry.train(parse_options([*words, "--network_weights=data.toml"]))
    assert as_pattern(message).search("".join(capfd.readouterr()) + caplog.text)
