"""How long a full-size SD 1.5 (fp16, CompVis layout, random weights) takes to open, beside plain reading, and in how much memory.

    python benchmarks/load_model.py [--format safetensors|ckpt|folder] [--dtype fp16|float] [--rounds 3]

Every measurement runs in a process of its own, the file being in the system's cache. Needs 5 GB of disk space.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

DTYPES = {"fp16": torch.float16, "float": torch.float32}


def make_file(path: Path, kind: str, family: str = "sd1") -> dict[str, float]:
    """Write a full-size model of a family with random fp16 weights."""
    from safetensors.torch import save_file

    from library.formats.compvis import join_compvis
    from library.models.clip import load_tokenizer
    from library.models.family import Model
    from library.models.modules import fill, weights_of
    from library.models.registry import by_name
    from library.models.saving import save_stable_diffusion
    from library.testing import full_size_configs

    chosen, configs = by_name(family), full_size_configs(family)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # billions of random numbers take a processor a minute
    modules = {part.name: part.build(configs[part.name]) for part in chosen.parts}
    parts = {name: weights_of(module) for name, module in modules.items()}
    for weights in parts.values():
        for name, value in weights.items():
            weights[name] = torch.empty(value.shape, dtype=torch.float16, device=device).uniform_(-0.05, 0.05).cpu()
    if kind == "folder":
        for name, module in modules.items():
            fill(module, parts[name], "random", name)
        tokenizers = [load_tokenizer(padding) for padding in chosen.text.paddings]
        save_stable_diffusion(Model(chosen, modules, tokenizers, "epsilon", "random"), path)
        return {}
    tensors = {name: value.contiguous() for name, value in join_compvis(parts, chosen.layout).items()}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)
    return {}


def rss() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_load(path: Path, dtype: torch.dtype) -> dict[str, float]:
    """Seconds to a ready model, bytes of its weights, and by how many bytes the peak of memory grew."""
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401  imports are not what is measured
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

    from library.models.loading import load_stable_diffusion

    before, cpu = rss(), time.process_time()
    start = time.perf_counter()
    model = load_stable_diffusion(str(path), dtype=dtype)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    weights = sum(value.nbytes for part in model.parts.values() for value in part.parameters())
    return {"seconds": seconds, "cpu": cpu, "weights": weights, "peak": rss() - before}


def measure_read(path: Path) -> dict[str, float]:
    """Seconds to have all bytes in memory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    cpu = time.process_time()
    start = time.perf_counter()
    contents = [file.read_bytes() for file in files]
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "bytes": sum(map(len, contents))}


def in_process(*arguments: str) -> dict[str, float]:
    """Run one measurement in a fresh process."""
    output = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=["safetensors", "ckpt", "folder"], default="safetensors")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # what, path: the inner process
    options = parser.parse_args()
    if options.measure:
        what, path = options.measure
        jobs = {
            "make": lambda: make_file(Path(path), options.format),
            "read": lambda: measure_read(Path(path)),
            "load": lambda: measure_load(Path(path), DTYPES[options.dtype]),
        }
        print(json.dumps(jobs[what]()))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("model" if options.format == "folder" else f"model.{options.format}")
        # Not here: Linux starts a process's peak of memory at that of the process which started it.
        in_process("--measure", "make", str(path), "--format", options.format)
        reads, loads = [], []
        for _ in range(options.rounds):  # in turns, so that a busy machine slows both
            reads.append(in_process("--measure", "read", str(path)))
            loads.append(in_process("--measure", "load", str(path), "--dtype", options.dtype))
    size = reads[0]["bytes"] / 1e9
    for kind in ("seconds", "cpu"):  # on a busy machine only the second can be trusted
        read, load = (statistics.median(run[kind] for run in runs) for runs in (reads, loads))
        unit = "s" if kind == "seconds" else "s of processor time"
        print(f"read the {size:.2f} GB {read:.2f} {unit}; load {load:.2f} {unit}, {load / read:.2f} x")
    peak, weights = max(run["peak"] for run in loads), loads[0]["weights"]
    print(f"weights {weights / 1e9:.2f} GB; peak memory beyond the imports {peak / 1e9:.2f} GB, {peak / weights:.2f} x")


if __name__ == "__main__":
    main()
