"""Network modules, imported by the name given on the command line: the suite's own, and others such as `lycoris.kohya`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError, nearest, one_line, unknown
from library.files import read_safetensors_metadata
from library.formats.low_rank import require_finite
from library.formats.tensor_file import read_safetensors
from library.text_files import parse_toml, read_text
from library.text_values import read_value

if TYPE_CHECKING:
    from library.models.family import Model


LORA_MODULE = "networks.lora"  # reads every kind of file that the suite knows
Texts = torch.nn.Module | list[torch.nn.Module]  # one text encoder, or several


class AdapterNetwork(torch.nn.Module):
    """Types of the methods of a network; docs/developing.md says when each is called. A network need not inherit from this."""

    apply_to: Callable[[Texts, torch.nn.Module, bool, bool], object]
    prepare_optimizer_params: Callable[[float | list[float] | None, float | None, float], Any]
    prepare_grad_etc: Callable[[Texts, torch.nn.Module], object]
    on_epoch_start: Callable[[Texts, torch.nn.Module], object]
    enable_gradient_checkpointing: Callable[[], object]
    save_weights: Callable[[str, torch.dtype | None, dict[str, str] | None], object]
    load_weights: Callable[[str], object]
    set_multiplier: Callable[[float], object]
    is_mergeable: Callable[[], bool]
    merge_to: Callable[[Texts, torch.nn.Module, dict[str, torch.Tensor], torch.dtype, torch.device], object]
    on_step_start: Callable[[Texts, torch.nn.Module], object]  # this one and the next two are optional
    apply_max_norm_regularization: Callable[[float, torch.device], object]
    summary: Callable[[torch.dtype | None], str]


def import_network_module(name: str) -> ModuleType:
    """The module that --network_module names. Raises UserError, for a wrong name with the most similar existing one."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # users keep their own modules in the current folder
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
    _fix_lycoris_preset(module)
    return module


def _fix_lycoris_preset(module: ModuleType) -> None:
    """Remove a class from LyCORIS 4.1's default preset. The preset finds time_embedding of a Stable Diffusion U-Net twice, by its
    name and by this class (which is for other models), and then raises an error for the duplicate name."""
    preset = getattr(module, "PRESET", {}).get("full", {})
    classes, names = preset.get("unet_target_module", ()), preset.get("unet_target_name", ())
    if "time_embedding.linear_1" in names and "TimestepEmbedding" in classes:
        preset["unet_target_module"] = [name for name in classes if name != "TimestepEmbedding"]


def _own_modules() -> list[str]:
    """The suite's network modules: those in networks/ that define create_network."""
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


def is_ours(module: ModuleType) -> bool:
    """Whether it is a network module of this suite."""
    return module.__name__.startswith("networks.")


def merging_module(module: ModuleType) -> ModuleType:
    """The module that merges the files of this one: for those of LyCORIS it is `networks.lora`.

    LyCORIS itself (3.4.0 and 4.1.3) merges at strength 1 whatever is asked for, and multiplies LoHa and LoKr by alpha / rank
    once more than in its forward pass.
    """
    return import_network_module(LORA_MODULE) if module.__name__.startswith("lycoris") else module


def network_from_file(
    module: ModuleType, file: str, strength: float, model: Model, *, where: str, **arguments: Any
) -> tuple[AdapterNetwork, dict[str, torch.Tensor]]:
    """A network for the weights of a file, not yet applied or loaded, and the weights.

    If another module than the suite's fails at a file that it wrote, as LyCORIS 4.1 does for ia3 and some lokr files, the network
    is made from the file's metadata. arguments: of --network_args. Raises UserError for weights that are not finite.
    """
    network, weights = _network_and_weights(module, file, strength, model, where, arguments)
    require_finite(weights, where)
    return network, weights


def _network_and_weights(
    module: ModuleType, file: str, strength: float, model: Model, where: str, arguments: Mapping[str, Any]
) -> tuple[AdapterNetwork, dict[str, torch.Tensor]]:
    parts = (model.vae, *model.for_networks())
    with user_errors(where):
        try:
            return module.create_network_from_weights(strength, str(file), *parts, **arguments)
        except Exception as error:
            if is_ours(module):
                raise
            recorded = _recorded_arguments(module, file)
            if recorded is None:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{where}: {module.__name__} makes no network from these weights ({reason})") from error
        dim, alpha, recorded_arguments = recorded
        network = module.create_network(strength, dim, alpha, *parts, **{**recorded_arguments, **arguments})
        return network, read_safetensors(file)


def _recorded_arguments(module: ModuleType, file: str) -> tuple[int, float, dict[str, str]] | None:
    """--network_dim, --network_alpha and --network_args from the metadata of a file that this module wrote; None without them."""
    if Path(file).suffix != ".safetensors":
        return None
    metadata = read_safetensors_metadata(file)
    if metadata.get("ss_network_module") != module.__name__:
        return None
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
        return int(metadata["ss_network_dim"]), float(metadata["ss_network_alpha"]), dict(arguments)
    except (KeyError, ValueError, TypeError, RecursionError):
        return None


def module_arguments(module: ModuleType, texts: Mapping[str, str]) -> dict[str, Any]:
    """The values of --network_args as the module takes them: text, as every module expects, in the plainest spelling.

    LyCORIS takes any text but "false" for true, and for some keys that one too; so it gets False itself.
    """
    values = {key: read_value(text) for key, text in texts.items()}
    is_lycoris = module.__name__.startswith("lycoris")
    return {
        key: False if is_lycoris and values[key] in (False, 0) else _plainly(values[key], text) for key, text in texts.items()
    }


def _plainly(value: Any, text: str) -> str:
    """The text of a bool or a whole number as `bool` and `int` of any module read it; else the text as it was given."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value) if isinstance(value, int) else text


def check_module_arguments(module: ModuleType, texts: Mapping[str, str], option: str) -> None:
    """Raises UserError for a key, an algorithm or a preset that LyCORIS lacks; its own errors would not name them.

    LyCORIS itself says nothing of a key that it does not read.
    """
    algorithms, presets = getattr(module, "network_module_dict", {}), getattr(module, "PRESET", {})
    if algorithms and (known := _keys_in_source(module)):
        for key in texts:
            if key not in known:
                raise unknown(f"{option} key", key, known)
    algo, preset = texts.get("algo", "").lower(), texts.get("preset", "")
    if algorithms and algo and algo not in algorithms:
        raise unknown(f"{option} algo", algo, algorithms)
    if presets and preset and preset not in presets and not Path(preset).is_file():
        close = nearest(preset, presets)
        cure = f"did you mean '{close}'?" if close else f"give one of {', '.join(presets)}, or a TOML file"
        raise UserError(f"{option} preset={preset}: there is no such preset and no such file; {cure}")
    if presets and preset and preset not in presets:
        parse_toml(read_text(Path(preset), f"{option} preset"), Path(preset))


def _keys_in_source(module: ModuleType) -> set[str]:
    """The keys of --network_args that a module's two functions read, by their source; none where that does not tell."""
    makers = [getattr(module, name, None) for name in ("create_network", "create_network_from_weights")]
    try:
        sources = [inspect.getsource(maker) for maker in makers if maker is not None]
    except OSError:
        return set()
    if any(source.count("**kwargs") > 1 for source in sources):  # they go on to where others read them
        return set()
    read = set(re.findall(r"""kwargs(?:\.get\(|\.pop\(|\[)\s*["'](\w+)["']""", "".join(sources)))
    optional = {p.name for p in inspect.signature(module.create_network).parameters.values() if p.default is not p.empty}
    return read | optional | {*getattr(module, "deprecated_arg_dict", {})} if read else set()


@contextmanager
def user_errors(where: str, module: ModuleType | None = None) -> Iterator[None]:
    """Turn ValueErrors of a network module into UserErrors that name the option.

    module: if it is not the suite's own, all its exceptions become UserErrors.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:
        if isinstance(error, UserError) or not (isinstance(error, AssertionError) or (module and not is_ours(module))):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}" if str(error) else f"{type(error).__name__} without a message"
        raise UserError(f"{where}: {reason}") from error
