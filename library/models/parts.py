"""The four parts of a Stable Diffusion model, and how modules are built without initialising weights that are then replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.imports import import_model_libraries
from library.models.clip import inner_text_model

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass
class StableDiffusion:
    """A model ready for use: every part in eval mode, no parameter asking for gradients."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    v2: bool
    v_parameterization: bool
    name: str  # as the user gave it
    path: Path | None = None  # the file or folder if it is on this machine, None for a hub id or a model made in memory


def empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A U-Net of this Diffusers configuration on the meta device: shapes only, no memory, no random numbers."""
    import_model_libraries()
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def empty_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    """A VAE of this Diffusers configuration on the meta device."""
    import_model_libraries()
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))


def empty_text_encoder(config: Mapping[str, Any]) -> CLIPTextModel:
    """A CLIP text encoder of this transformers configuration on the meta device."""
    import_model_libraries()
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))


def text_weights(text_encoder: nn.Module) -> dict[str, Tensor]:
    """The text encoder's weights without `text_model.` in their names, the same in every version of transformers."""
    weights = inner_text_model(text_encoder).state_dict()
    return {name: value for name, value in weights.items() if not name.endswith("position_ids")}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Make `tensors` the weights of a module on the meta device, without copying, and ready it for use.

    Raises UserError, naming `source` and the first weight that is missing, left over or of another shape.
    """
    module = inner_text_model(module)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items() if not name.endswith("position_ids")}
    kind = {"UNet2DConditionModel": "U-Net", "AutoencoderKL": "VAE"}.get(type(module).__name__, "text encoder")
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights of the {kind}, the first is {missing[0]}; fetch the whole model")
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        raise UserError(f"{source} holds {len(unknown)} weights that no {kind} of SD 1 or 2 has, such as {unknown[0]}")
    for name, value in tensors.items():
        if tuple(value.shape) != expected[name]:
            raise UserError(
                f"{source}: {name} of the {kind} has the shape {tuple(value.shape)} where {expected[name]} is needed; "
                "the file is damaged or its configuration belongs to another model"
            )
    module.load_state_dict(dict(tensors), strict=False, assign=True)
    _fill_position_ids(module, next(iter(tensors.values())).device)


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
