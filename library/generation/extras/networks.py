"""Networks (LoRAs and others) on a model that draws: loaded from files, set to their strengths for each image."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import UserError, counted
from library.files import read_safetensors_metadata
from library.formats.lora_base import lora_metadata, unlike_base
from library.generation.options import NetworkOptions
from library.generation.prompts.loras import PromptLoras, split_loras
from library.generation.prompts.spec import PromptSpec
from library.key_values import read_pairs
from library.network_modules import (
    LORA_MODULE,
    check_module_arguments,
    import_network_module,
    merging_module,
    module_arguments,
    network_from_file,
    user_errors,
)

if TYPE_CHECKING:
    from library.models.family import Model

log = logging.getLogger(__name__)


@dataclass
class LoadedNetwork:
    """One file on the model. `weights` are those of the file, as long as they have to be merged again.

    number: no other one of the run has it.
    """

    path: Path
    module: ModuleType
    network: Any  # see the contract of network modules in docs/developing.md
    weights: dict[str, Tensor]
    number: int


class Networks:
    """All networks of a run: those of the command line, in order, and those that prompts ask for by `<lora:name:0.8>`.

    A network is read and attached once; a change of strength touches no weight, and a network of strength 0 costs nothing.
    With `pre_calc` the weights of the model become weights + strength x network instead, once for each change of strengths, and
    get back their own values, bit for bit, before the next one. What is merged is part of the model for good.
    """

    def __init__(self, model: Model, *, pre_calc: bool = False, lora_dir: Path | None = None) -> None:
        self.model, self.pre_calc = model, pre_calc
        self._named = PromptLoras(lora_dir)
        self.merged: list[tuple[Path, float]] = []
        self.loaded: list[LoadedNetwork] = []
        self.defaults: tuple[float, ...] = ()
        self._read_files = 0
        self._from_prompts: dict[Path, LoadedNetwork] = {}
        self._state: tuple[tuple[int, float], ...] = ()
        self._own_weights: dict[str, Tensor] = {}  # of the model, by parameter, for pre_calc

    @classmethod
    def load(cls, model: Model, chosen: NetworkOptions) -> Networks:
        """The files of --network_weights on the model, which must be on its device and in its dtype.

        Raises UserError, naming the file, for one that does not fit the model.
        """
        problems = chosen.problems()
        if problems:
            raise UserError("; ".join(problems))
        files, modules, args = chosen.network_weights or [], chosen.network_module or [LORA_MODULE], chosen.network_args or []
        given = chosen.network_mul or []
        strengths = [*given, *[1.0] * (len(files) - len(given))]
        networks = cls(model, pre_calc=chosen.network_pre_calc, lora_dir=Path(chosen.lora_dir) if chosen.lora_dir else None)
        merged = len(files) if chosen.network_merge else chosen.network_merge_n_models or 0
        for index, (file, strength) in enumerate(zip(files, strengths, strict=True)):
            if chosen.network_show_meta:
                show_file_metadata(Path(file))
            module = import_network_module(modules[min(index, len(modules) - 1)])
            words = args[index] if index < len(args) else ""
            loaded = networks.read(Path(file), module, words, "--network_weights", merges=index < merged)
            if index < merged:
                networks.merge(loaded, strength)
                networks.merged.append((loaded.path, strength))
            else:
                networks._attach(loaded)
                networks.loaded.append(loaded)
        networks.defaults = tuple(strengths[merged:])
        networks.set(networks.defaults)
        return networks

    # ---- what an image uses

    def multipliers(self, spec: PromptSpec) -> tuple[float, ...]:
        """The strengths of `loaded` for this image: those of the spec, its last one for all that follow, or else the defaults."""
        if spec.multipliers is None:
            return self.defaults
        if len(spec.multipliers) > len(self.loaded):
            merged = ", and what is merged has its strength for good" if self.merged else ""
            raise UserError(
                f"--am gives {counted(len(spec.multipliers), 'strength')} for {counted(len(self.loaded), 'network')}{merged}"
            )
        return spec.multipliers + spec.multipliers[-1:] * (len(self.loaded) - len(spec.multipliers))

    def used(self, spec: PromptSpec) -> list[tuple[Path, float]]:
        """Every file that acts on this image, with its strength; those of strength 0 are left out."""
        own = [(loaded.path, strength) for loaded, strength in zip(self.loaded, self.multipliers(spec), strict=True)]
        asked = [(self.find(name), strength) for name, strength in split_loras(spec.prompt)[1]]
        return [(path, strength) for path, strength in self.merged + own + asked if strength != 0]

    def find(self, name: str) -> Path:
        """The file that a prompt calls `name`."""
        return self._named.find(name)

    # ---- strengths

    def set(self, multipliers: Iterable[float], prompt_loras: Iterable[tuple[str, float]] = ()) -> None:
        """From now on `loaded` have these strengths, and the named LoRAs act too; all others do nothing."""
        active = list(zip(self.loaded, multipliers, strict=True))
        for name, strength in prompt_loras:
            path = self.find(name)
            if path not in self._from_prompts:
                loaded = self.read(path, import_network_module(LORA_MODULE), "", f"<lora:{name}>")
                self._attach(loaded)
                self._from_prompts[path] = loaded
            active.append((self._from_prompts[path], strength))
        self._set_state(active)

    @property
    def state(self) -> tuple[tuple[int, float], ...]:
        """Which networks act and how strongly: equal states change the model equally."""
        return self._state

    def close(self) -> None:
        """The model as it was, except for what was merged."""
        self._set_state([])
        for loaded in [*self.loaded, *self._from_prompts.values()]:
            if not self.pre_calc and hasattr(loaded.network, "unapply"):
                loaded.network.unapply()
        self.loaded, self.defaults = [], ()
        self._from_prompts.clear()

    def _set_state(self, active: list[tuple[LoadedNetwork, float]]) -> None:
        strengths: dict[int, float] = {}
        for loaded, strength in active:  # one that is named twice acts with the sum
            strengths[loaded.number] = strengths.get(loaded.number, 0.0) + strength
        state = tuple((key, strength) for key, strength in strengths.items() if strength != 0)
        everything = {loaded.number: loaded for loaded in [*self.loaded, *self._from_prompts.values()]}
        if not self.pre_calc:
            for key, loaded in everything.items():
                loaded.network.set_multiplier(strengths.get(key, 0.0))
        elif state != self._state:
            self._restore_own_weights()
            for key, strength in state:
                self.merge(everything[key], strength)
        self._state = state

    # ---- one file

    def read(self, path: Path, module: ModuleType, args: str, where: str, merges: bool = False) -> LoadedNetwork:
        if not path.is_file():
            raise UserError(f"{where} {path}: there is no such file")
        words = read_pairs([args], "--network_args")
        check_module_arguments(module, words, "--network_args")
        if (merges or self.pre_calc) and merging_module(module) is not module:
            module, words = merging_module(module), {}  # the words are for the other one
        arguments = module_arguments(module, words)
        network, weights = network_from_file(
            module, str(path), 1.0, self.model, where=f"{where} {path}", for_inference=True, **arguments
        )
        for reason in unlike_base(lora_metadata(path), self.model.family.records, self.model.prediction):
            log.warning("%s %s", path, reason)
        self._read_files += 1
        return LoadedNetwork(path, module, network, weights, self._read_files)

    def _attach(self, loaded: LoadedNetwork) -> None:
        """Make the network act on the model, or for `pre_calc` note which weights of the model it will change."""
        model, network = self.model, loaded.network
        if self.pre_calc:
            return self._note_own_weights(loaded)
        with user_errors(str(loaded.path)):
            network.apply_to(*model.for_networks(), True, True)
            result = network.load_state_dict(loaded.weights, strict=False)
        missing = [key for key in result.missing_keys if not key.endswith(".alpha")]
        if missing:
            log.warning(f"{loaded.path} lacks {counted(len(missing), 'weight')} of its network, such as {missing[0]}")
        network.to(model.denoiser.device, model.denoiser.dtype).eval().requires_grad_(False)
        loaded.weights = {}

    def merge(self, loaded: LoadedNetwork, strength: float) -> None:
        network = loaded.network
        if not getattr(network, "is_mergeable", lambda: True)():
            cure = "leave --network_merge and --network_pre_calc out"
            raise UserError(f"{loaded.path}: this network of {loaded.module.__name__} cannot be merged; {cure}")
        network.set_multiplier(strength)
        model = self.model
        with user_errors(str(loaded.path)), torch.no_grad():
            network.merge_to(*model.for_networks(), loaded.weights, model.denoiser.dtype, model.denoiser.device)

    # ---- pre_calc

    def _parameters(self) -> dict[str, Tensor]:
        parts = [part.name for part in self.model.family.parts if part.role != "vae"]
        return {f"{part} {name}": value for part in parts for name, value in self.model.parts[part].named_parameters()}

    @torch.no_grad()
    def _note_own_weights(self, loaded: LoadedNetwork) -> None:
        """Merge on trial, and keep copies of what that touched. Torch counts the changes of a tensor in `_version`."""
        self._set_state([])
        before = {name: (value.detach().clone(), value._version, value.data_ptr()) for name, value in self._parameters().items()}
        self.merge(loaded, 1.0)
        for name, value in self._parameters().items():
            copy, *identity = before[name]
            if [value._version, value.data_ptr()] != identity:
                self._own_weights.setdefault(name, copy)
        self._restore_own_weights()

    @torch.no_grad()
    def _restore_own_weights(self) -> None:
        parameters = self._parameters()
        for name, value in self._own_weights.items():
            parameters[name].copy_(value)


def show_file_metadata(path: Path) -> None:
    """Print the metadata of a .safetensors file."""
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        print(f"{path} has no metadata" if path.is_file() else f"{path}: there is no such file")
        return
    metadata = read_safetensors_metadata(path)
    print(f"{path}: " + (json.dumps(metadata, indent=2, ensure_ascii=False) if metadata else "no metadata"))
