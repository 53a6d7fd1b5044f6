"""Inputs of the command line and of its files: words of every program, training configs, prompt files."""

from __future__ import annotations

import importlib
import json
import random
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import quickstart
from benchmarks.fuzzing import mutations
from benchmarks.fuzzing.case import Case, Lost, training
from benchmarks.fuzzing.data import as_toml, good_image, is_passed_over, write_config
from benchmarks.fuzzing.shelf import Shelf
from library.command_line import choices_of, is_flag, is_list, option_fields
from library.generation.options import GenerateOptions
from library.generation.program import main as draw
from library.tools.command import Parser
from library.training.options import TrainNetworkOptions

TOOLS = (
    "networks.check_lora_weights", "networks.extract_lora_from_dylora", "networks.extract_lora_from_models",
    "networks.merge_lora", "networks.resize_lora", "networks.svd_merge_lora", "tools.convert_diffusers20_original_sd",
    "tools.resize_images_to_resolution", "tools.doctor", "tools.demo", "tools.make_example_dataset",
)  # fmt: skip
# They train, draw or read an archive with no option at all; so here they always get one that is wrong.
SLOW_WITHOUT_ERROR = ("tools.demo", "tools.make_example_dataset", "tools.doctor")
NUMBERS = ("0", "1", "2", "3", "8", "64", "0.5", "1e-4", "-1", "1.5", "1000", "100000000000000000000")
WORDS_OF_LISTS = ("decouple=True", "weight_decay=0.01", "betas=0.9,0.99", "conv_dim=4", "T_max=3", "a=b=c", "=", "lr=1")


def training_words(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """A command line of train_network.py or sdxl_train_network.py."""
    words = words_of_a_run(folder, shelf)
    odd, unknown = _random_words(rng, TrainNetworkOptions)
    family = "sdxl" if rng.random() < 0.1 else None
    return training(folder, words + odd, _never(unknown), family)


def training_config(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """A --config_file, TOML or JSON, as people and front ends write it."""
    config: dict[str, Any] = {}
    for word in words_of_a_run(folder, shelf):
        name, _, value = word.removeprefix("--").partition("=")
        config[name] = value if not value.isdigit() else int(value)
    unknown = ""
    fields = option_fields(TrainNetworkOptions)
    for name in mutations.some(rng, sorted(fields), 6):
        if rng.random() < 0.1:
            name = unknown = mutations.misspelt(rng, name)
            config[name] = rng.choice(("x", 1, 2.5))
        else:
            config[name] = _value(rng, fields[name])
    if rng.random() < 0.3:  # by groups, as some people write it
        names = sorted(config)
        rng.shuffle(names)
        config = {"model": {name: config[name] for name in names[::2]}, "rest": {name: config[name] for name in names[1::2]}}
    name, is_damaged = write_config(rng, folder, "run", config)
    lost = partial(is_passed_over, unknown) if unknown and not is_damaged and unknown.lower() not in fields else None
    return training(folder, [f"--config_file={name}"], lost)


def drawing_words(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """A command line of gen_img_diffusers.py."""
    words = [f"--ckpt={shelf.model}", "--outdir=out", "--W=64", "--H=64", "--steps=1"]
    words += rng.choice((["--prompt=a cat"], ["--from_file=prompts.txt"], ["--interactive"], []))
    (folder / "prompts.txt").write_text("a cat\na dog --n bad --d 1\n", encoding="utf-8")
    odd, unknown = _random_words(rng, GenerateOptions)
    return Case(draw, words + odd, folder, _never(unknown), stdin=b"a cat\n\n")


def prompt_file(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """Prompts in a file or on the command line, or sample prompts of a training."""
    lines = []
    for _ in range(rng.randrange(1, 5)):
        line = rng.choice(("a cat", "a {dog|cat}", "(cat:1.3) BREAK [dog]", "<lora:lora:0.5> a", mutations.text(rng)))
        for name in mutations.some(rng, ("w", "h", "d", "s", "l", "n", "t", "nl", "am", "ss", "ds", "f", "cn", "x"), 3):
            line += f" --{name} {rng.choice((*NUMBERS, mutations.text(rng)))}"
        lines.append(line)
    suffix = rng.choice(("txt", "txt", "toml", "json"))
    text = "\n".join(lines)
    if suffix == "json":
        text = json.dumps(
            [{"prompt": line, rng.choice(("width", "seed", "steps", "x")): rng.choice(mutations.ODD_VALUES)} for line in lines]
        )
    if suffix == "toml":
        text = as_toml({"prompt": {"subset": [{"prompt": line, "seed": rng.choice(mutations.ODD_VALUES)} for line in lines]}})
    content = mutations.encoded(rng, text)
    if rng.random() < 0.2:
        content = mutations.damaged(rng, content)
    (folder / f"odd.{suffix}").write_bytes(content)
    if rng.random() < 0.3:
        words = [*words_of_a_run(folder, shelf), f"--sample_prompts=odd.{suffix}", "--sample_every_n_steps=1"]
        return training(folder, words)
    words = [f"--ckpt={shelf.model}", "--outdir=out", "--W=64", "--H=64", "--steps=1", f"--lora_dir={shelf.folder}"]
    words += ["--from_file=-"] if suffix == "txt" and rng.random() < 0.2 else [f"--from_file=odd.{suffix}"]
    return Case(draw, words, folder, stdin=content)


def tool_words(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """A command line of a tool."""
    name = rng.choice(TOOLS)
    words, unknown = list(_good_words(name, folder, shelf)), ""
    parser = parser_of(name)
    options = [action for action in parser._actions if action.option_strings and action.dest not in ("help", "self_test")]
    for action in mutations.some(rng, options, 4):
        words.append(action.option_strings[0])
        if action.nargs != 0:
            values = list(action.choices or NUMBERS)
            words.append(str(rng.choice(values)) if rng.random() < 0.6 else mutations.argument(rng))
    if words and rng.random() < 0.3:
        del words[rng.randrange(len(words))]
    if rng.random() < 0.2 or name in SLOW_WITHOUT_ERROR:
        unknown = f"--{mutations.misspelt(rng, 'save_to_nowhere')}"
        words.append(unknown)
    return Case(importlib.import_module(name).main, words, folder, _never(unknown))


def quickstart_words(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """A wrong word of quickstart.py; a right one would set up."""
    words = rng.choice(
        ([mutations.misspelt(rng, "setup"), "x"], ["setup", mutations.argument(rng)], ["tests"], ["Demo", "--steps=1"])
    )
    return Case(partial(quickstart.main, words), words, folder, _never("a word"))


@cache
def parser_of(name: str) -> Parser:
    """The parser that a tool's main makes."""

    class Found(Exception):
        pass

    found: list[Parser] = []

    def keep(parser: Parser, *_: object) -> None:
        found.append(parser)
        raise Found

    before = Parser.parse_args
    Parser.parse_args = keep  # type: ignore[method-assign, assignment]
    try:
        importlib.import_module(name).main()
    except Found:
        return found[0]
    finally:
        Parser.parse_args = before  # type: ignore[method-assign]
    raise ValueError(f"{name}.main reads no options")


def _good_words(name: str, folder: Path, shelf: Shelf) -> list[str]:
    """What the tool needs at least."""
    lora, model, out = str(shelf.lora_file), str(shelf.model), "out/x.safetensors"
    return {
        "networks.check_lora_weights": [lora],
        "networks.extract_lora_from_dylora": [f"--model={lora}", f"--save_to={out}", "--unit=1"],
        "networks.extract_lora_from_models": [f"--model_org={model}", f"--model_tuned={model}", f"--save_to={out}"],
        "networks.merge_lora": [f"--save_to={out}", "--models", lora, lora, "--ratios", "0.5", "0.5"],
        "networks.resize_lora": [f"--model={lora}", f"--save_to={out}", "--new_rank=1"],
        "networks.svd_merge_lora": [f"--save_to={out}", "--models", lora, lora, "--ratios", "0.5", "0.5"],
        "tools.convert_diffusers20_original_sd": [model, out],
        "tools.resize_images_to_resolution": [str(_images(folder)), "out", "--max_resolution=64x64"],
    }.get(name, [])


def words_of_a_run(folder: Path, shelf: Shelf) -> list[str]:
    """A small run whose images lie in the folder."""
    return [
        f"--pretrained_model_name_or_path={shelf.model}", f"--train_data_dir={_images(folder).parent}",
        "--caption_extension=.txt", "--resolution=64", "--network_module=networks.lora", "--network_dim=2",
        "--output_dir=out", "--output_name=x", "--seed=1", "--max_train_steps=1", "--max_data_loader_n_workers=0",
        "--learning_rate=1e-3",
    ]  # fmt: skip


def _images(folder: Path) -> Path:
    place = folder / "data" / "1_x"
    if not place.exists():
        good_image(place)
    return place


def _random_words(rng: random.Random, options: type[BaseModel]) -> tuple[list[str], str]:
    """Up to six options with values, right and odd, and the unknown option among them, if there is one."""
    fields, words, unknown = option_fields(options), [], ""
    for name in mutations.some(rng, sorted(fields), 6):
        field = fields[name]
        if rng.random() < 0.04:
            unknown = f"--{mutations.misspelt(rng, name)}"
            words.append(unknown)
            continue
        value = _value(rng, field)
        if is_flag(field):
            words += [f"--{name}"] if rng.random() < 0.95 else [f"--{name}={value}"]
        elif isinstance(value, list):
            words += [f"--{name}", *(str(entry).replace("\0", "") for entry in value)]
        elif rng.random() < 0.05:
            words.append(f"--{name}")  # its value is missing
        else:
            words.append(f"--{name}={str(value).replace(chr(0), '')}")
    if rng.random() < 0.05:
        words.append(mutations.argument(rng))
    return words, "" if unknown.removeprefix("--") in fields else unknown


def _value(rng: random.Random, field: FieldInfo) -> Any:
    """A value that the option may have, or an odd one."""
    if rng.random() < 0.25:
        return rng.choice(mutations.ODD_VALUES)
    if is_flag(field):
        return rng.random() < 0.7
    if is_list(field):
        return mutations.some(rng, WORDS_OF_LISTS, 3)
    choices = list(choices_of(field))
    if choices:
        return rng.choice(choices)
    kind = str(field.annotation)
    if "int" in kind or "float" in kind or "Count" in kind:
        return rng.choice((0, 1, 1, 1, 2, 8, 64, 0.1, 0.5, -1))
    return rng.choice(("x", "1", "data", "out", "x.weights", mutations.text(rng)))


def _never(unknown: str) -> Lost | None:
    """A command line with an unknown option must not end well."""
    return (lambda text: f"{unknown} is taken without a word") if unknown else None
