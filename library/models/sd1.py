"""Stable Diffusion 1.x."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from library.diffusion.process import Prediction
from library.formats.families import SD1
from library.models import clip, unet
from library.models.family import Conditioning, Config, Family, Part, Shapes, TextRules
from library.models.vae import KL_VAE

if TYPE_CHECKING:
    from torch import Tensor

    from library.models.family import Model


def predict(model: Model, noisy: Tensor, t: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
    """The U-Net attends to the text and does not use the sizes."""
    return model.denoiser(noisy, t, encoder_hidden_states=conditioning["context"]).sample


def context_shape(model: Model, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"context": (tokens, model.denoiser.config.cross_attention_dim)}


def unet_part(heads: int | None, upcast_attention: bool, sizes: dict[Prediction, int]) -> Part:
    """The U-Net. The arguments cannot be read from weights; `sizes`: of the latents it was trained on, by prediction."""

    def read_config(shapes: Shapes, prediction: Prediction) -> Config:
        return unet.read_unet_config(shapes, heads=heads, upcast_attention=upcast_attention, sample_size=sizes[prediction])

    return Part(
        name="unet",
        role="denoiser",
        title="U-Net",
        build=unet.empty_unet,
        read_config=read_config,
        library=("diffusers", "UNet2DConditionModel"),
        weight_files=("diffusion_pytorch_model",),
    )


def text_part(activation: str) -> Part:
    """The text encoder; OpenCLIP's has another activation than CLIP's."""
    return Part(
        name="text_encoder",
        role="text",
        title="text encoder",
        build=clip.empty_text_encoder,
        read_config=lambda shapes, prediction: clip.read_text_config(shapes, activation=activation),
        library=("transformers", "CLIPTextModel"),
        weight_files=("model", "pytorch_model"),
        file_paths=lambda module: clip.path_in_files,
    )


def has_activation(name: str, configs: dict[str, Config]) -> bool:
    """Whether a folder's only text encoder has this activation (small models may have any width)."""
    return "text_encoder_2" not in configs and (configs["text_encoder"].get("hidden_act") == "gelu") == (name == "gelu")


FAMILY = Family(
    name="sd1",
    title=SD1.title,
    parts=(unet_part(heads=8, upcast_attention=False, sizes={"epsilon": 64, "v": 64}), KL_VAE, text_part("quick_gelu")),
    layout=SD1.layout,
    pipeline="StableDiffusionPipeline",
    owns_folder=partial(has_activation, "quick_gelu"),
    text=TextRules(("<|endoftext|>",), clip.last_layer_conditioning, context_shape, unread=clip.layers_behind),
    predict=predict,
    records=SD1.records,
)
