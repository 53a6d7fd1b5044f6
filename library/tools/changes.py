"""The weight changes of LoRA files and other adapters as dense matrices, for tools that make a LoRA of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.formats.lora_file import LoraFile
from library.formats.lora_targets import weight_targets
from library.formats.tensor_file import open_tensors
from library.tools.checkpoint import family_of_model, loras_for, warn_of_open_blocks

WeightOf = Callable[[str], Tensor | None]  # LoRA name -> the layer's weight in the base model, float32; None if there is none

_IS_3X3 = re.compile(
    r"lora_unet_(?:.*(?:conv1|conv2|samplers_0_conv|conv_in|conv_out|in_layers_2|out_layers_3|_0_op|_[12]_conv)"
    r"|input_blocks_0_0|out_2)"
)


@contextmanager
def base_weights(sd_model: str | None, loras: Sequence[LoraFile]) -> Iterator[tuple[WeightOf, list[LoraFile]]]:
    """The weights of the model that `--sd_model` names, if any, and the LoRA files with the names of its layers.

    Raises UserError if it is not of the LoRAs' family.
    """
    if sd_model is None:
        warn_of_open_blocks(loras, "for KOALA give the model with --sd_model")
        yield lambda name: None, list(loras)
        return
    with open_tensors(Path(sd_model)) as model:
        named = loras_for(model, family_of_model(model), loras)
        targets = weight_targets(model.shapes)

        def weight_of(name: str) -> Tensor | None:
            if name not in targets:
                return None
            return targets[name].weight(model.view(targets[name].key)).float()

        yield weight_of, named


def matrices_alone(loras: Sequence[LoraFile]) -> list[LoraFile]:
    """The files without changes of norm layers and biases, which a LoRA cannot express. A warning counts and names them."""
    result = []
    for lora in loras:
        modules = {name: module for name, module in lora.modules.items() if module.changes_matrix}
        norms = [name for name in lora.modules if name not in modules]
        biases = [name for name, module in modules.items() if module.changes_bias]
        if not modules:
            raise UserError(f"{lora.path} changes norm layers and biases alone, such as {norms[0]}, which no LoRA can")
        if norms or biases:
            counts = f"{len(norms)} norm layers or biases alone, {len(biases)} biases beside weights"
            first = (norms or biases)[0]
            print(f"warning: {lora.path}: a LoRA cannot change {counts}; left out, such as {first}", file=sys.stderr)
        result.append(replace(lora, modules=modules))
    return result


def dense_change(lora: LoraFile, name: str, weight_of: WeightOf) -> Tensor:
    """The change of a layer's weight at full strength: float32, (out, in) or (out, in, k, k)."""
    adapter, weight = lora.modules[name], weight_of(name)
    if weight is None:
        if adapter.needs_weight:
            raise UserError(
                f"{lora.path}: {name} is of the kind {adapter.title}, whose change depends on the layer's own weight; "
                "give the model that it is for with --sd_model"
            )
        sizes = adapter.matrix_shape
        if sizes is None:
            raise UserError(
                f"{lora.path}: {name} is of the kind {adapter.title} and does not tell the layer's shape; give --sd_model"
            )
        is_kernel = _IS_3X3.fullmatch(name) and sizes[1] % 9 == 0
        weight = torch.empty((sizes[0], sizes[1] // 9, 3, 3) if is_kernel else sizes, device="meta")
    try:
        return adapter.weight_change(weight)
    except UserError as error:
        raise UserError(f"{lora.path}: {error}") from error
