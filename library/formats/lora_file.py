"""LoRA files: read in any layout, checked, and written in kohya's with the hashes that web UIs know them by."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError, listed
from library.formats.adapters.kind import Parts
from library.formats.adapters.lora import LORA
from library.formats.adapters.registry import Adapter, find_adapter
from library.formats.families import FILE_FAMILIES, FileFamily, titles
from library.formats.foreign import instead_of_a_lora
from library.formats.lora_family import families_of_lora
from library.formats.lora_hashes import hashes
from library.formats.lora_layouts import (
    USUAL_RESNETS,
    PeftConfig,
    kohya_layers,
    lora_name,
    naming_family,
    resnets_of,
    with_alphas,
)
from library.formats.low_rank import LowRank, require_finite
from library.formats.tensor_file import Windows, open_tensors
from library.formats.tensor_output import rows_in, write_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraFile:
    """A file of LoRAs or other adapters: what it has for each layer, by kohya name, in the file's order, and its metadata.

    paths: the layers as the file names them, by kohya name. families: those that it can be for. dtype: of its weights. left_out:
    keys of tensors that are no part of it, and of modules of rank 0. windows: the mapped memory that its tensors are in; whoever
    goes through a large file forgets it now and then.
    """

    path: Path
    modules: dict[str, Adapter]
    metadata: dict[str, str]
    dtype: torch.dtype
    paths: dict[str, str]
    families: tuple[FileFamily, ...] = FILE_FAMILIES
    left_out: tuple[str, ...] = ()
    windows: Windows = field(default_factory=Windows, repr=False, compare=False)

    @property
    def title(self) -> str:
        return self.metadata.get("modelspec.title") or self.path.stem

    @property
    def family(self) -> FileFamily | None:
        """The family that it is for; None if that is not known."""
        return self.families[0] if len(self.families) == 1 else None

    @cached_property
    def resnets(self) -> int | None:
        """Of each level of the U-Net that it is for; None if its layers do not show it."""
        return resnets_of(self.paths.values())

    def for_families(self, families: Sequence[FileFamily], resnets: int | None = None) -> LoraFile:
        """The same as a file for one of these, with the names that it has then.

        resnets: of each level of the model's U-Net; None: as the file shows.
        """
        both = tuple(family for family in self.families if family in families)
        if both == self.families and resnets is None:
            return self
        names = self._names(naming_family(both), resnets or self.resnets or USUAL_RESNETS)
        paths = {new: self.paths[old] for old, new in names.items()}
        return replace(self, modules={names[old]: module for old, module in self.modules.items()}, paths=paths, families=both)

    def _names(self, family: FileFamily, resnets: int) -> dict[str, str]:
        """The names of its modules for a U-Net of this family with so many ResNets in each level, by their names here."""
        return {name: lora_name(self.paths[name], family, resnets) or name for name in self.modules}

    @property
    def leaves_blocks_open(self) -> bool:
        """Whether it has layers that are of other blocks in the one U-Net of its family than in another, and shows not for which.

        Of few layers in Diffusers' layout: KOALA's U-Net has one ResNet in each level where SDXL's has two.
        """
        if self.family is None or self.resnets is not None:
            return False
        return self._names(self.family, 1) != self._names(self.family, 2)

    def require_finite(self) -> None:
        """UserError, naming the key, if a number is NaN or infinite."""
        for name, module in self.modules.items():
            require_finite({f"{name}.{inside}": tensor for inside, tensor in module.parts.tensors.items()}, self.path)
            self.windows.forget(module.nbytes)


def read_lora(file: str | Path) -> LoraFile:
    """Read a LoRA file, or another kind of adapter, whatever its layout. No alpha, or 0, means the rank.

    What is no part of it is left out, with a warning that names it. UserError, naming the file and the module or tensor, if it is
    damaged, nothing of the kind, or its shapes do not fit together.
    """
    path = Path(file)
    with open_tensors(path) as weights:
        found = {name: weights.view(name) for name in weights.shapes}  # mapped memory, which outlives the open file
        metadata = dict(weights.metadata)
    _check_family(found, path)
    families = families_of_lora({name: tuple(tensor.shape) for name, tensor in found.items()}, metadata)
    found = with_alphas(dict(sorted(found.items())), PeftConfig(path, metadata))
    try:
        layers = kohya_layers(found, naming_family(families))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    left_out, modules = list(layers.others), {}
    for layer, tensors in layers.tensors.items():
        adapter = find_adapter(layer, tensors)
        if adapter is None or _has_rank_0(adapter):
            left_out += [f"{layer}.{inside}" for inside in tensors]
            continue
        left_out += [f"{layer}.{inside}" for inside in adapter.unknown]
        known = {inside: tensor for inside, tensor in tensors.items() if inside not in adapter.unknown}
        modules[layer] = replace(adapter, parts=Parts(layer, known))
        _check(layer, modules[layer], path)
    if not modules:
        _raise_for_nothing(found, left_out, path)
    if left_out:
        logger.warning("%s: left out, since no layer has a use for them: %s", path, listed(left_out, 3))
    return LoraFile(path, modules, metadata, _dtype(modules), layers.paths, families, tuple(left_out), weights.windows)


def _check_family(tensors: Mapping[str, Tensor], path: Path) -> None:
    if found := instead_of_a_lora(tensors):
        what, key = found
        raise UserError(f"{path} is {what} (it holds {key}); only LoRA files for {titles(FILE_FAMILIES)} can be used")


def _raise_for_nothing(tensors: Mapping[str, Tensor], left_out: Sequence[str], path: Path) -> None:
    if not tensors:
        raise UserError(f"{path} holds no tensors; it is no LoRA")
    raise UserError(f"{path} is no LoRA file of a known kind: the tensor {left_out[0]} is not part of one, nor are the others")


def _has_rank_0(adapter: Adapter) -> bool:
    return any(not tensor.numel() for name, tensor in adapter.parts.tensors.items() if name in adapter.kind.names)


def _dtype(modules: Mapping[str, Adapter]) -> torch.dtype:
    """That of the first weights; numbers that are no weights are often of another."""
    tensors = [tensor for module in modules.values() for name, tensor in module.parts.tensors.items() if name != "alpha"]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def _check(name: str, adapter: Adapter, path: Path) -> None:
    parts = adapter.parts.tensors
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise UserError(f"{path}: the alpha of {name} is no single number but has the shape {tuple(parts['alpha'].shape)}")
    if adapter.kind is not LORA:
        try:
            _ = adapter.matrix_shape
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return
    for side in ("down", "up"):
        if f"lora_{side}.weight" not in parts:
            raise UserError(f"{path}: the module {name} has no {side} weight; the file is incomplete")
        tensor = parts[f"lora_{side}.weight"]
        if not tensor.is_floating_point():
            raise UserError(f"{path}: the {side} weight of {name} is {tensor.dtype}, not of floating point")
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    fits = up.dim() in (2, 4) and down.dim() in (2, 4) and up.numel() and down.numel() and up[0, 0].numel() == 1
    if not fits or up.shape[1] != down.shape[0] or (down.dim() == 2 and up.dim() == 4):
        raise UserError(f"{path}: the shapes of {name} do not fit together (down {tuple(down.shape)}, up {tuple(up.shape)})")


def read_loras(files: Sequence[str]) -> list[LoraFile]:
    """Read files that are to be combined: finite, and all for one family of models, whose names they get."""
    loras = [read_lora(file) for file in files]
    for lora in loras:
        lora.require_finite()
    common = FILE_FAMILIES
    for lora in loras:
        both = tuple(family for family in common if family in lora.families)
        if not both:
            other = next((one for one in loras if not set(one.families) & set(lora.families)), loras[0])
            found = f"{other.path} is for {titles(other.families)} and {lora.path} for {titles(lora.families)}"
            raise UserError(f"{found}; they cannot be combined")
        common = both
    shown = next((lora.resnets for lora in loras if lora.resnets), None)
    loras = [lora.for_families(common, None if lora.resnets else shown) for lora in loras]
    shapes: dict[str, tuple[LoraFile, tuple[int, int]]] = {}
    for lora in loras:
        for name, module in lora.modules.items():
            own = module.matrix_shape
            if own is None:
                continue
            first, shape = shapes.setdefault(name, (lora, own))
            if shape != own:
                raise UserError(
                    f"{name} changes a layer of {shape[1]} in, {shape[0]} out in {first.path} and of "
                    f"{own[1]} in, {own[0]} out in {lora.path}; "
                    "they are for models of different kinds"
                )
    return loras


def all_names(loras: Sequence[LoraFile]) -> list[str]:
    """The modules of all files, each once, in the order of the files."""
    return list(dict.fromkeys(name for lora in loras for name in lora.modules))


def write_lora(path: Path, modules: Mapping[str, LowRank], metadata: Mapping[str, str], dtype: torch.dtype) -> None:
    """Write a file in kohya's layout, whole or not at all, a tensor at a time; see `write_weights`. Alpha, too, is of that dtype.

    `.ckpt` and `.pt` have no place for the metadata.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in modules.items():
        shapes |= {f"{name}.alpha": (), f"{name}.lora_down.weight": tuple(module.down.shape)}
        shapes[f"{name}.lora_up.weight"] = tuple(module.up.shape)
    plan = {key: (shapes[key], dtype) for key in sorted(shapes)}

    @lru_cache(2)
    def tensors(name: str) -> dict[str, Tensor]:
        module = modules[name]
        return {
            "alpha": torch.tensor(module.alpha, dtype=torch.float64),
            "lora_down.weight": module.down,
            "lora_up.weight": module.up,
        }

    def rows_of(key: str, rows: slice) -> Tensor:
        name, _, inside = key.partition(".")
        return rows_in(tensors(name)[inside], rows).to(dtype)

    write_weights(path, plan, rows_of, {**metadata, **hashes(plan, rows_of, metadata)})
