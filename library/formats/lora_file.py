"""LoRA files: read in any layout, checked, and written in kohya's with the hashes that web UIs know them by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from library.errors import UserError
from library.files import atomic_write
from library.formats.lora_hashes import with_hashes
from library.formats.lora_layouts import PeftConfig, find_factors
from library.formats.low_rank import LowRank, is_finite
from library.formats.tensor_file import open_tensors
from library.formats.tensor_output import save_pickled

WIDTHS = {768: False, 1024: True}  # of the text encoder: SD 1.x, SD 2.x. Others are small models, of which they tell nothing.


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file: its modules by kohya name, in the file's order, and its metadata. dtype: of its weights."""

    path: Path
    modules: dict[str, LowRank]
    metadata: dict[str, str]
    dtype: torch.dtype

    @property
    def title(self) -> str:
        return self.metadata.get("modelspec.title") or self.path.stem

    @property
    def v2(self) -> bool | None:
        """Whether it is for SD 2.x, by its metadata, or else the width of the text encoder; None if nothing tells."""
        if self.metadata.get("ss_v2") in ("True", "False"):
            return self.metadata["ss_v2"] == "True"
        for name, module in self.modules.items():
            if name.endswith(("_attn2_to_k", "_attn2_to_v", "_self_attn_q_proj", "_self_attn_k_proj", "_self_attn_v_proj")):
                return WIDTHS.get(module.matrix_shape[1])
        return None

    def require_finite(self) -> None:
        """UserError, naming the module, if a number is NaN or infinite."""
        for name, module in self.modules.items():
            if not module.is_finite():
                raise UserError(f"{self.path}: the module {name} holds NaN or infinity; the file is of no use")


def read_lora(file: str | Path) -> LoraFile:
    """Read a LoRA file, whatever its layout. No alpha, or 0, means the rank.

    UserError, naming the file and the module or tensor, if it is damaged, no LoRA, or its shapes do not fit together.
    """
    path = Path(file)
    with open_tensors(path) as weights:
        found = {name: weights.view(name) for name in weights.shapes}  # mapped memory, which outlives the open file
        metadata = dict(weights.metadata)
    factors, paths = find_factors(dict(sorted(found.items())), str(path))
    if not factors:
        raise UserError(f"{path} holds no tensors; it is no LoRA")
    config = PeftConfig(path, metadata)
    modules = {}
    for name, parts in factors.items():
        _check(name, parts, path)
        rank = len(parts["down"])
        given = float(parts["alpha"]) if "alpha" in parts else config.alpha(paths[name], rank)
        modules[name] = LowRank(parts["up"], parts["down"], given or float(rank))
    return LoraFile(path, modules, metadata, next(iter(modules.values())).up.dtype)


def _check(name: str, parts: Mapping[str, Tensor], path: Path) -> None:
    for side in ("down", "up"):
        if side not in parts:
            raise UserError(f"{path}: the module {name} has no {side} weight; the file is incomplete")
        if not parts[side].is_floating_point():
            raise UserError(f"{path}: the {side} weight of {name} is {parts[side].dtype}, not of floating point")
    up, down = parts["up"], parts["down"]
    fits = up.dim() in (2, 4) and down.dim() in (2, 4) and up.numel() and down.numel() and up[0, 0].numel() == 1
    if not fits or up.shape[1] != down.shape[0] or (down.dim() == 2 and up.dim() == 4):
        raise UserError(f"{path}: the shapes of {name} do not fit together (down {tuple(down.shape)}, up {tuple(up.shape)})")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise UserError(f"{path}: the alpha of {name} is no single number but has the shape {tuple(parts['alpha'].shape)}")


def read_loras(files: Sequence[str]) -> list[LoraFile]:
    """Read files that are to be combined: finite, and all for the same generation of Stable Diffusion."""
    loras = [read_lora(file) for file in files]
    for lora in loras:
        lora.require_finite()
    by_generation = {lora.v2: lora for lora in loras if lora.v2 is not None}
    if len(by_generation) > 1:
        raise UserError(
            f"{by_generation[False].path} is for SD 1.x and {by_generation[True].path} for SD 2.x; they cannot be combined"
        )
    shapes: dict[str, tuple[LoraFile, tuple[int, int]]] = {}
    for lora in loras:
        for name, module in lora.modules.items():
            first, shape = shapes.setdefault(name, (lora, module.matrix_shape))
            if shape != module.matrix_shape:
                raise UserError(
                    f"{name} changes a layer of {shape[1]} in, {shape[0]} out in {first.path} and of "
                    f"{module.matrix_shape[1]} in, {module.matrix_shape[0]} out in {lora.path}; "
                    "they are for models of different kinds"
                )
    return loras


def all_names(loras: Sequence[LoraFile]) -> list[str]:
    """The modules of all files, each once, in the order of the files."""
    return list(dict.fromkeys(name for lora in loras for name in lora.modules))


def tensors_of(modules: Mapping[str, LowRank], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What a file holds, in kohya's layout. Alpha, too, is of that dtype."""
    for name, module in modules.items():
        yield f"{name}.alpha", torch.tensor(module.alpha, dtype=dtype)
        yield f"{name}.lora_down.weight", _saved(module.down, dtype)
        yield f"{name}.lora_up.weight", _saved(module.up, dtype)


def _saved(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy, since safetensors refuses tensors that share memory, as those of a pickled file may.
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor)


def write_lora(path: Path, modules: Mapping[str, LowRank], metadata: Mapping[str, str], dtype: torch.dtype) -> None:
    """Write a file, whole or not at all, after reading it back. `.ckpt` and `.pt` have no place for the metadata."""
    tensors = dict(tensors_of(modules, dtype))
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(f"{path} was not written: {key} holds NaN or infinity in {str(dtype).removeprefix('torch.')}")
    with atomic_write(path) as temporary:
        if path.suffix.lower() == ".safetensors":
            safetensors.torch.save_file(tensors, temporary, with_hashes(tensors, metadata))
        else:
            save_pickled(tensors, temporary)
        with open_tensors(temporary) as written:
            same = written.shapes.keys() == tensors.keys()
            if not same or not all(torch.equal(written.view(key), tensor) for key, tensor in tensors.items()):
                raise UserError(f"{path} was not written: it did not read back as it was written; check the disk")
