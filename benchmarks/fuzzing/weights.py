"""Inputs of what reads weights: LoRA files and checkpoints that are damaged, misnamed, of odd types or shapes."""

from __future__ import annotations

import io
import json
import random
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from benchmarks.fuzzing import mutations
from benchmarks.fuzzing.case import Case, Lost, training
from benchmarks.fuzzing.options import words_of_a_run
from benchmarks.fuzzing.shelf import Shelf
from library.generation.program import main as draw

DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool)
METADATA = (
    "ss_network_dim",
    "ss_network_args",
    "ss_tag_frequency",
    "ss_base_model_version",
    "ss_network_module",
    "modelspec.architecture",
)


def lora_file(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """A LoRA file, given to one of the programs that read it."""
    content = dict(shelf.lora)
    _change_tensors(rng, content)
    path, is_whole = _write(rng, folder / "odd", content)
    lora, good, out = str(path), str(shelf.lora_file), "out/x.safetensors"
    program = rng.choice(("check", "resize", "merge", "svd", "model", "model", "dylora", "train", "draw"))
    if program == "train":
        words = [*words_of_a_run(folder, shelf), f"--network_weights={lora}"]
        return training(folder, words + rng.choice(([], ["--dim_from_weights"])))
    if program == "draw":
        words = [f"--ckpt={shelf.model}", f"--network_weights={lora}", "--network_module=networks.lora"]
        return Case(draw, [*words, "--outdir=out", "--W=64", "--H=64", "--steps=1", "--prompt=a"], folder)
    name, words = {
        "check": ("check_lora_weights", [lora]),
        "resize": ("resize_lora", [f"--model={lora}", f"--save_to={out}", "--new_rank=1"]),
        "merge": ("merge_lora", [f"--save_to={out}", "--models", lora, good, "--ratios", "1", "0.5"]),
        "svd": ("svd_merge_lora", [f"--save_to={out}", "--models", lora, good, "--ratios", "1", "0.5", "--new_rank=2"]),
        "model": ("merge_lora", [f"--sd_model={shelf.model}", f"--save_to={out}", "--models", lora, "--ratios", "1"]),
        "dylora": ("extract_lora_from_dylora", [f"--model={lora}", f"--save_to={out}", "--unit=1"]),
    }[program]
    lost = partial(_modules_lost, content, folder / out) if is_whole and program in ("resize", "merge", "svd") else None
    return _tool(name, words, folder, lost)


def checkpoint(rng: random.Random, folder: Path, shelf: Shelf) -> Case:
    """A checkpoint, given to one of the programs that read it."""
    content = dict(shelf.checkpoint)
    _change_tensors(rng, content)
    path, _ = _write(rng, folder / "odd", content)
    model, good, lora, out = str(path), str(shelf.model), str(shelf.lora_file), "out/x.safetensors"
    program = rng.choice(("convert", "folder", "merge", "extract", "train", "train", "draw"))
    if program == "train":
        return training(folder, [*words_of_a_run(folder, shelf), f"--pretrained_model_name_or_path={model}"])
    if program == "draw":
        return Case(draw, [f"--ckpt={model}", "--outdir=out", "--W=64", "--H=64", "--steps=1", "--prompt=a"], folder)
    if program in ("convert", "folder"):
        from tools.convert_diffusers20_original_sd import main

        return Case(main, [model, out if program == "convert" else "out/folder"], folder)
    name, words = {
        "merge": ("merge_lora", [f"--sd_model={model}", f"--save_to={out}", "--models", lora, "--ratios", "1"]),
        "extract": ("extract_lora_from_models", [f"--model_org={good}", f"--model_tuned={model}", f"--save_to={out}", "--dim=1"]),
    }[program]
    return _tool(name, words, folder)


def _tool(name: str, words: list[str], folder: Path, lost: Lost | None = None) -> Case:
    from importlib import import_module

    return Case(import_module(f"networks.{name}").main, words, folder, lost)


def _change_tensors(rng: random.Random, content: dict[str, Tensor]) -> None:
    """Up to four accidents: names, shapes, types and values that no good file has."""
    for _ in range(rng.randrange(5)):
        name = rng.choice(sorted(content))
        value, accident = content[name], rng.randrange(9)
        if accident == 0:
            del content[name]
        elif accident == 1:
            content[rng.choice((name.replace("_", "."), f"x.{name}", name.upper(), mutations.text(rng), name[:-3]))] = (
                content.pop(name)
            )
        elif accident == 2:
            content[name] = value.to(rng.choice(DTYPES))
        elif accident == 3:
            content[name] = value.reshape(rng.choice(((-1,), (1, -1), (-1, 1), (1, 1, -1), (-1, 1, 1, 1)))).clone()
        elif accident == 4:
            content[name] = value[:0].clone() if value.dim() else torch.empty(0)
        elif accident == 5:
            content[name] = torch.full_like(value.float(), rng.choice((float("nan"), float("inf"), 0.0, -1e30, 1e38)))
        elif accident == 6:
            content[f"{mutations.text(rng)}{name}"] = value.clone()
        elif accident == 7 and value.dim():
            content[name] = value.transpose(0, -1).contiguous()
        else:
            content[name] = torch.cat([value.reshape(-1), value.reshape(-1)[:1]])


def _write(rng: random.Random, stem: Path, content: dict[str, Tensor]) -> tuple[Path, bool]:
    """A file of the tensors in any container, damaged in a part of the cases; and whether it is a whole .safetensors file."""
    suffix = rng.choice((".safetensors", ".safetensors", ".safetensors", ".ckpt", ".pt", ".bin"))
    metadata = {key: mutations.text(rng) for key in mutations.some(rng, METADATA, 3)}
    unicode_only = {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()}
    names = {name.encode("utf-8", "replace").decode(): value.contiguous() for name, value in content.items()}
    if suffix == ".safetensors":
        data = save({name: value.clone() for name, value in names.items()}, unicode_only)
    else:
        buffer = io.BytesIO()
        torch.save(rng.choice((names, {"state_dict": names}, [names], {"a": {"b": names}}, None)), buffer)
        data = buffer.getvalue()
    is_whole = suffix == ".safetensors"
    if rng.random() < 0.4:
        data = _damaged_header(rng, data) if is_whole and rng.random() < 0.6 else mutations.damaged(rng, data)
        is_whole = False
    if rng.random() < 0.05:
        suffix, is_whole = rng.choice((".safetensors", ".ckpt", ".txt")), False
    path = stem.with_name(stem.name + suffix)
    path.write_bytes(data)
    return path, is_whole


def _damaged_header(rng: random.Random, data: bytes) -> bytes:
    """A .safetensors file whose JSON header says odd things of its tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.randrange(1, 3)):
        entry = header[rng.choice(names)]
        key = rng.choice(("dtype", "shape", "data_offsets", "x"))
        entry[key] = rng.choice((*mutations.ODD_VALUES, "F8_E4M3", "F4", "U64", [2**40], [-1, 2], [0, 2**62], [10, 5], [1.5]))
    if rng.random() < 0.2:
        header["__metadata__"] = rng.choice(mutations.ODD_VALUES)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _modules_lost(content: dict[str, Tensor], output: Path, printed: str) -> str:
    """LoRA modules of the input that are neither in the output nor spoken of."""
    found = {name.partition(".")[0] for name in load_file(output)}
    wanted = {name.partition(".")[0] for name in content if name.startswith("lora_") and name.endswith(".lora_up.weight")}
    missing = wanted - found
    is_said = any(word in printed for word in ("left out", "leaves out", "warning", "not "))
    return f"{sorted(missing)[:3]} are not in the output, and nothing is said" if missing and not is_said else ""
