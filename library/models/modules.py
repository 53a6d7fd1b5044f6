"""Parts of models: built without initial weights on the meta device, then filled with weights of a file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.errors import UserError, counted

TEXT_MODEL = "text_model."  # prefix of a text encoder's names on disk; from transformers 5.6 on `CLIPTextModel` does not have it


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a part by name. Names of a text encoder have no `text_model.`, in every version of transformers."""
    return {name: value for name, value in _canonical(module).items() if not name.endswith("position_ids")}


def _canonical(module: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix(TEXT_MODEL): value for name, value in module.state_dict().items()}


def weights_fingerprint(*modules: nn.Module) -> str:
    """64 hex digits over weights and their dtypes, as a part of cache keys."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(weights_of(module).items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str, kind: str) -> None:
    """Make `tensors` (named as by `weights_of`) the weights of a module on the meta device, without copying.

    Raises UserError, naming `source`, `kind` and the first weight that is missing, unknown or of another shape.
    """
    expected = {name: tuple(value.shape) for name, value in weights_of(module).items()}
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise UserError(
            f"{source} lacks {counted(len(missing), 'weight')} of the {kind}, the first is {missing[0]}; fetch the whole model"
        )
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        raise UserError(f"{source} holds {counted(len(unknown), 'weight')} that no {kind} of its kind has, such as {unknown[0]}")
    for name, value in tensors.items():
        if tuple(value.shape) != expected[name]:
            raise UserError(
                f"{source}: {name} of the {kind} has the shape {tuple(value.shape)} where {expected[name]} is needed; "
                "the file is damaged or its configuration belongs to another model"
            )
    own = {name: tensors[short] for name in module.state_dict() if (short := name.removeprefix(TEXT_MODEL)) in tensors}
    module.load_state_dict(own, strict=False, assign=True)
    _fill_position_ids(module, next(iter(tensors.values())).device)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put the modules into eval mode for the block, then restore the mode of every submodule."""
    training = [child for module in modules for child in module.modules() if child.training]
    try:
        for child in training:
            child.training = False
        yield
    finally:
        for child in training:
            child.training = True


def for_inference(module: nn.Module) -> nn.Module:
    """Eval mode, no gradients. Training enables gradients where it needs them."""
    return module.eval().requires_grad_(False)


def _fill_position_ids(module: nn.Module, device: torch.device) -> None:
    """Fill CLIP's buffer of positions 0..76, which is not a weight and need not be in a file."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            parent, _, last = name.rpartition(".")
            if last != "position_ids":
                raise RuntimeError(f"buffer {name} has no value")
            positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            module.get_submodule(parent).register_buffer(last, positions, persistent=False)


def count_indices(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """The number of consecutive indices, from 0 on, that the pattern's group matches in the names."""
    found = {int(match.group(1)) for name in shapes if (match := re.fullmatch(pattern, name))}
    return next(number for number in range(len(found) + 1) if number not in found)
