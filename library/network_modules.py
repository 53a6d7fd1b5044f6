"""Network modules, named on the command line and imported by that name: ours, and those of others such as `lycoris.kohya`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from library.errors import UserError, nearest


def import_network_module(name: str) -> ModuleType:
    """The module that --network_module names; a wrong name is answered with the nearest one that exists."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a module of one's own lies where one works
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        close = nearest(name.replace("\\", "/").replace("/", ".").removesuffix(".py"), _own_modules())
        cure = f"did you mean '{close}'?" if close else _cure_for_missing(name)
        raise UserError(f"--network_module {name}: there is no such module; {cure}")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--network_module {name} does not import: {error}; install what it needs with pip") from error
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module {name} is no network module: it has no create_network; try networks.lora")
    _mend_lycoris(module)
    return module


def _mend_lycoris(module: ModuleType) -> None:
    """LyCORIS 4.1's usual preset finds time_embedding of a Stable Diffusion U-Net twice, by its name and by its class (which is
    meant for other models), and then stops at the double name: so it gets the name alone."""
    preset = getattr(module, "PRESET", {}).get("full", {})
    classes, names = preset.get("unet_target_module", ()), preset.get("unet_target_name", ())
    if "time_embedding.linear_1" in names and "TimestepEmbedding" in classes:
        preset["unet_target_module"] = [name for name in classes if name != "TimestepEmbedding"]


def _own_modules() -> list[str]:
    """Network modules of this suite: those in networks/ that can create a network."""
    spec = importlib.util.find_spec("networks")
    names = [f"networks.{module.name}" for module in pkgutil.iter_modules(spec.submodule_search_locations)] if spec else []
    return [n for n in names if b"def create_network(" in _source(n)]


def _source(module_name: str) -> bytes:
    spec = importlib.util.find_spec(module_name)
    return open(spec.origin, "rb").read() if spec and spec.origin else b""


def _cure_for_missing(name: str) -> str:
    if name.startswith("lycoris"):
        return "run: pip install lycoris-lora"
    return f"known: {', '.join(_own_modules())}; a module of your own must be importable from this folder"


class WithTextModel(torch.nn.Module):
    """A text encoder with the level `text_model` above its layers, which `CLIPTextModel` lost in transformers 5.6.

    Files have that level in their names, and modules of others make names by walking through the text encoder.
    """

    def __init__(self, text_encoder: torch.nn.Module) -> None:
        super().__init__()
        self.text_model = text_encoder


def named_text_encoder(module: ModuleType, text_encoder: torch.nn.Module) -> torch.nn.Module:
    """The text encoder as a network module should see it to give its layers the names that files have; ours know them anyway."""
    knows_names = module.__name__.startswith("networks.") or hasattr(text_encoder, "text_model")
    return text_encoder if knows_names else WithTextModel(text_encoder)


def key_values(text: str, option: str) -> dict[str, str]:
    """`key=value;key=value` as a dictionary of texts."""
    words = [word.partition("=") for word in text.split(";") if word.strip()]
    if any(not sign or not key.strip() for key, sign, _ in words):
        raise UserError(f"{option} '{text}': write key=value;key=value")
    return {key.strip(): value.strip() for key, _, value in words}


@contextmanager
def user_errors(where: str) -> Iterator[None]:
    """Turn the one-line ValueErrors of a network module, and assertions of those of others, into UserErrors that name the option."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{where}: {error}") from error
    except AssertionError as error:  # LyCORIS checks so
        raise UserError(f"{where}: {error or 'an assertion failed'}") from error
