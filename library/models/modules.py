"""How parts of models are built without initialising weights that are then replaced, and filled with those of a file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.errors import UserError

TEXT_MODEL = "text_model."  # before a text encoder's names on disk; `CLIPTextModel` lost that level in transformers 5.6


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a part. A text encoder's come without `text_model.`, the same in every version of transformers."""
    return {name: value for name, value in _canonical(module).items() if not name.endswith("position_ids")}


def _canonical(module: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix(TEXT_MODEL): value for name, value in module.state_dict().items()}


def weights_fingerprint(*modules: nn.Module) -> str:
    """64 hex digits over weights and their dtypes, to tell whether what is cached was made with them."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(weights_of(module).items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str, kind: str) -> None:
    """Make `tensors` (named as by `weights_of`) the weights of a module on the meta device, without copying.

    Raises UserError, naming `source`, `kind` and the first weight that is missing, left over or of another shape.
    """
    expected = {name: tuple(value.shape) for name, value in weights_of(module).items()}
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights of the {kind}, the first is {missing[0]}; fetch the whole model")
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        raise UserError(f"{source} holds {len(unknown)} weights that no {kind} of its kind has, such as {unknown[0]}")
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
    """Put the modules into evaluation mode, without dropout; afterwards every part of them has the mode that it had."""
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def ready(module: nn.Module) -> nn.Module:
    """Eval mode, no gradients: what training wants to train it turns on itself."""
    return module.eval().requires_grad_(False)


def _fill_position_ids(module: nn.Module, device: torch.device) -> None:
    """Give CLIP's table of positions 0..76 its values: it is no weight, so no file has to hold it."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            parent, _, last = name.rpartition(".")
            if last != "position_ids":
                raise RuntimeError(f"buffer {name} has no value")
            positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            module.get_submodule(parent).register_buffer(last, positions, persistent=False)


def count_numbers(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """How many numbers, from 0 on, stand at the pattern's group."""
    found = {int(match.group(1)) for name in shapes if (match := re.fullmatch(pattern, name))}
    return next(number for number in range(len(found) + 1) if number not in found)
