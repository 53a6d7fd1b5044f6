"""The large libraries, imported in less time than they take by themselves, and with nothing taken away from them.

Two things cost seconds at each start. Python's collector of cyclic garbage goes again and again through the many objects that an
import makes, all of which stay. And Diffusers imports bitsandbytes, which imports torch's compiler, for models in 4 and 8 bits.
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
    """Diffusers and transformers, as far as every model needs them."""
    with collector_resting(), postponed("bitsandbytes"):
        import diffusers
        import transformers

        # Both find their classes when these are asked for.
        diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.DDIMScheduler  # noqa: B018
        transformers.CLIPTextModel, transformers.CLIPTokenizer  # noqa: B018


@contextmanager
def collector_resting() -> Iterator[None]:
    """Import something large inside: no garbage collection meanwhile, and none ever of what was imported."""
    was_enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:  # else there is nothing new, and garbage of others would be kept
            gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def postponed(*names: str) -> Iterator[None]:
    """Inside, `import name` gives a stand-in, which imports the module when something of it is asked for, inside or later.

    Afterwards `import name` is as ever. Modules that are not installed, or imported already, are left alone.
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
    # What is asked of any module, such as by who looks whether it is installed, needs no import.
    module.__spec__, module.__file__ = spec, spec.origin

    def from_the_real_one(attribute: str) -> Any:
        _remove(module)
        return getattr(importlib.import_module(name), attribute)

    module.__getattr__ = from_the_real_one  # type: ignore[method-assign]  # PEP 562: a module's own, no method's
    return module


def _remove(stand_in: ModuleType) -> None:
    if sys.modules.get(stand_in.__name__) is stand_in:
        del sys.modules[stand_in.__name__]
