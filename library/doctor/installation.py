"""Report on the installation: versions, devices, what works, and what to install. It downloads and changes nothing.

This file imports only the standard library at its top, since it reports missing packages.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from library.errors import counted

ROOT = Path(__file__).resolve().parents[2]
OLDEST, NEWEST = (3, 10), (3, 13)
MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


@dataclass(frozen=True)
class Finding:
    """One line of the report. state: `ok`, `note` (training runs without it), or `bad` (training cannot run)."""

    state: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"  {MARKS[self.state]}  {self.name:<22} {self.text}"


def python_version() -> Finding:
    """The interpreter."""
    here, name = sys.version_info[:2], f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if here < OLDEST:
        return Finding("bad", "Python", f"{name}; at least {'.'.join(map(str, OLDEST))} is needed")
    return Finding(
        "ok" if here <= NEWEST else "note", "Python", name + ("" if here <= NEWEST else "; newer than what was tested")
    )


def requirement_lines(file: Path) -> Iterator[tuple[str, str, str]]:
    """(package, version, remark) of the lines that hold for this Python and system."""
    for line in file.read_text(encoding="utf-8").splitlines():
        words, _, remark = line.partition("#")
        match = re.match(r"([\w-]+)==([\w.]+)\s*(?:;\s*(.+))?", words.strip())
        if match and _holds(match[3]):
            yield match[1], match[2], remark.strip()


def _holds(marker: str | None) -> bool:
    if not marker or importlib.util.find_spec("packaging") is None:  # a dependency of other requirements, which may be missing
        return True
    from packaging.markers import Marker

    return Marker(marker.strip()).evaluate()


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def needed_packages() -> Iterator[Finding]:
    """The packages of requirements.txt."""
    for package, wanted, _ in requirement_lines(ROOT / "requirements.txt"):
        version = installed(package)
        if version is None:
            yield Finding("bad", package, f"missing; run: pip install {package}=={wanted}")
        elif version.partition("+")[0] != wanted:
            yield Finding("note", package, f"{version}; tested with {wanted}")
        else:
            yield Finding("ok", package, version)


def extra_packages() -> Iterator[Finding]:
    """The packages of requirements-extras.txt, each with the option that needs it."""
    for package, wanted, remark in requirement_lines(ROOT / "requirements-extras.txt"):
        version = installed(package)
        text = version or f"not installed; for {remark}: pip install {package}=={wanted}"
        yield Finding("ok" if version else "note", package, text)


def devices() -> Iterator[Finding]:
    """CPU, memory and GPUs."""
    import psutil

    from library.devices import cores_for_this_process, cpu_has_fast_bf16

    yield Finding(
        "ok", "CPU", f"{counted(cores_for_this_process(), 'core')}, {psutil.virtual_memory().total / 2**30:.0f} GiB memory"
    )
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            yield Finding("ok", f"GPU {number}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding("ok", "mixed precision", "fp16 and bf16" if fast else "fp16; bf16 is not supported by this card")
        return
    if torch.backends.mps.is_available():
        yield Finding("ok", "GPU", "Apple silicon (mps)")
    build = (
        "torch is a build without CUDA" if torch.version.cuda is None else "torch has CUDA and finds no card; check the driver"
    )
    yield Finding("note", "GPU", f"no NVIDIA card: training a real model will be slow; {build}")
    bf16 = "no, and bf16 too" if cpu_has_fast_bf16() else "no; bf16 works and is many times slower on this processor"
    yield Finding("ok", "mixed precision", bf16)


def eight_bit() -> Finding:
    """One step of an 8-bit optimizer."""

    def step() -> str:
        import bitsandbytes
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        parameter = torch.nn.Parameter(torch.ones(64, 64, device=device))
        parameter.grad = torch.ones_like(parameter)
        bitsandbytes.optim.AdamW8bit([parameter], lr=0.1, min_8bit_size=1).step()
        if not bool((parameter < 1).all()):
            raise RuntimeError("a step changed nothing")
        return f"works on the {'GPU' if device == 'cuda' else 'CPU'}"

    return tried("8-bit optimizers", step, "take --optimizer_type AdamW; reinstall: pip install --force-reinstall bitsandbytes")


def xformers() -> Finding:
    """Whether --xformers has an effect."""

    def use() -> str:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("it needs an NVIDIA card")
        import xformers.ops  # noqa: F401

        return "works"

    return tried("xformers", use, "nothing to do: torch's own attention is as exact and nearly as fast")


def opencv() -> Finding:
    """OpenCV, which changes hues and resizes by area."""

    def use() -> str:
        import cv2
        import numpy

        cv2.resize(numpy.zeros((8, 8, 3), numpy.uint8), (4, 4), interpolation=cv2.INTER_AREA)
        return cv2.__version__

    return tried("opencv", use, "run: pip install --force-reinstall opencv-python-headless", needed=True)


def compiling() -> Finding:
    """Whether --torch_compile can work: it needs a C++ compiler for the CPU, Triton for a GPU. Nothing is compiled."""
    import torch

    if torch.cuda.is_available():
        works = importlib.util.find_spec("triton") is not None
        return Finding(
            "ok" if works else "note", "torch_compile", "Triton is there" if works else "needs Triton: pip install triton"
        )
    compiler = next((name for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name and shutil.which(name)), None)
    return Finding(
        "ok" if compiler else "note", "torch_compile", f"C++ compiler {compiler}" if compiler else "needs a C++ compiler"
    )


def disk() -> Finding:
    """Free space in the current folder."""
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding("ok" if free > 5 else "note", "disk", f"{free:.0f} GiB free in {Path.cwd()}")


def tried(name: str, work: Callable[[], str], cure: str, *, needed: bool = False) -> Finding:
    """The finding of `work`, which returns its text; if it fails, the reason and the cure."""
    try:
        return Finding("ok", name, work())
    except Exception as error:  # broken installations raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        return Finding("bad" if needed else "note", name, f"{reason}; {cure}")


def sections() -> Iterator[tuple[str, list[Finding]]]:
    """Headings with their findings. If torch, psutil or numpy is missing, only those about packages."""
    packages = list(needed_packages())
    yield "Python and packages", [python_version(), *packages]
    yield "Extras", list(extra_packages())
    if any(finding.state == "bad" and finding.name in ("torch", "psutil", "numpy") for finding in packages):
        return
    yield "This machine", [*devices(), disk()]
    yield "What works", [eight_bit(), xformers(), opencv(), compiling()]
