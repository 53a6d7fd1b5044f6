"""Faster imports of Diffusers and transformers.

Two things cost time at each start: Python's garbage collector traverses the many objects that an import makes, again and
again, although all of them stay; and Diffusers, for models in 4 and 8 bits, imports bitsandbytes, which imports torch's
compiler. `import_model_libraries` takes 2.4 s of processor time; without one of the two remedies 3.2 s (AMD EPYC, torch 2.13).
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from typing import Any


@cache
def import_model_libraries() -> None:
    """Import Diffusers and transformers, and their classes that every model needs."""
    with garbage_collection_paused(), deferred("bitsandbytes"):
        import diffusers
        import transformers

        # Both import a class when its attribute is read.
        diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.DDIMScheduler  # noqa: B018
        transformers.CLIPTextModel, transformers.CLIPTokenizer  # noqa: B018


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """For large imports: no garbage collection in the block, and later none of the objects that it made (gc.freeze)."""
    was_enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:  # else nothing was imported, and freezing would only keep garbage
            gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def deferred(*names: str) -> Iterator[None]:
    """In the block, `import name` gives a stand-in that imports the module when an attribute of it is read, then or later.

    After the block `import name` imports the module. No effect for modules that are not installed or imported already.
    """
    with ExitStack() as stack:
        for name in names:
            if name not in sys.modules and (stand_in := _stand_in(name)) is not None:
                sys.modules[name] = stand_in
                stack.callback(_remove, stand_in)
        yield


def _stand_in(name: str) -> ModuleType | None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return None
    module = ModuleType(name)
    # Code that checks whether the module is installed reads these; that must not import it.
    module.__spec__, module.__file__ = spec, spec.origin

    def import_and_get(attribute: str) -> Any:
        _remove(module)
        return getattr(importlib.import_module(name), attribute)

    module.__getattr__ = import_and_get  # type: ignore[method-assign]  # PEP 562: a function of the module, not a method
    return module


def _remove(stand_in: ModuleType) -> None:
    if sys.modules.get(stand_in.__name__) is stand_in:
        del sys.modules[stand_in.__name__]
