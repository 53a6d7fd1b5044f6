"""Faster start: a deferred module has everything when an attribute of it is read, and garbage collection runs again."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from library.imports import deferred, garbage_collection_paused

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that is imported by nobody yet, with a submodule."""
    folder = tmp_path / "slow_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("from slow_package import part\nVALUE = 3\n", encoding="utf-8")
    (folder / "part.py").write_text("class Thing: pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "slow_package"
    for name in [name for name in sys.modules if name.partition(".")[0] == "slow_package"]:
        del sys.modules[name]


def test_a_deferred_module_is_imported_when_something_of_it_is_used(package):
    with deferred(package):
        early = importlib.import_module(package)

        assert importlib.util.find_spec(package).origin.endswith("__init__.py")  # it counts as installed
        assert hasattr(early, "__file__") and early.__name__ == package
    assert package not in sys.modules and f"{package}.part" not in sys.modules
    assert early.VALUE == 3
    assert sys.modules[package] is not early and early.part is sys.modules[f"{package}.part"]


def test_importing_a_deferred_module_later_is_as_ever(package):
    with deferred(package):
        early = importlib.import_module(package)
    thing = importlib.import_module(f"{package}.part").Thing

    assert early.part.Thing is thing and sys.modules[package].VALUE == 3
    with pytest.raises(AttributeError, match="nothing"):
        _ = early.nothing


def test_a_deferred_module_that_is_used_at_once_is_imported_at_once(package):
    with deferred(package):
        early = importlib.import_module(package)

        assert early.VALUE == 3
        real = importlib.import_module(package)
        assert real is not early
    assert sys.modules[package] is real


def test_postponing_leaves_alone_what_is_imported_or_missing(package):
    real = importlib.import_module(package)
    with deferred(package, "no_such_package_at_all"):
        assert sys.modules[package] is real
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("no_such_package_at_all")
    assert sys.modules[package] is real


def test_the_collector_rests_inside_and_works_afterwards(package):
    before = gc.get_freeze_count()
    with pytest.raises(KeyError), garbage_collection_paused():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == before  # nothing was imported: no garbage is kept for good
    try:
        with garbage_collection_paused(), garbage_collection_paused():
            importlib.import_module(package)
        assert gc.isenabled() and gc.get_freeze_count() > before
        gc.disable()
        with garbage_collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


START = """
import sys
from library.testing import small_stable_diffusion
small_stable_diffusion()
loaded = {name.partition(".")[0] for name in sys.modules}
heavy = ["bitsandbytes", "networkx", "scipy", "sklearn", "pandas", "matplotlib", "tensorboard", "torchvision", "cv2"]
assert not loaded & set(heavy), sorted(loaded & set(heavy))
assert "torch._inductor.compile_fx" not in sys.modules, "torch's compiler"

from diffusers.quantizers.bitsandbytes import utils
from diffusers.utils import is_bitsandbytes_available, is_peft_available
assert is_bitsandbytes_available() and is_peft_available()
import torch
from bitsandbytes.optim import AdamW8bit
weight = torch.nn.Parameter(torch.ones(8))
weight.grad = torch.ones(8)
AdamW8bit([weight], lr=0.1).step()
assert weight.max() < 1
import bitsandbytes
assert utils.bnb.nn.Linear4bit is bitsandbytes.nn.Linear4bit
print("all there")
"""


def test_a_model_is_loaded_without_what_no_run_uses_and_nothing_is_missing_afterwards():
    """In a process of its own, as this one has everything loaded."""
    pytest.importorskip("bitsandbytes")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", START], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "all there", done.stderr[-2000:]
