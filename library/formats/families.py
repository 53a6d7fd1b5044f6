"""The families of models as files know them: the names in checkpoints and in LoRA files, and what metadata say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from library.formats.compvis import SD1_LAYOUT, SD2_LAYOUT, SDXL_LAYOUT, Layout, layout_of
from library.formats.prediction import Prediction

GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"


@dataclass(frozen=True)
class Records:
    """What files say about the family, by what the model predicts.

    earlier_releases: what LoRAs for releases with other weights have as ss_base_model_version -> the name of the release.
    """

    v2: bool  # ss_v2
    base_model_version: Mapping[Prediction, str]
    architecture: Mapping[Prediction, str]  # modelspec.architecture
    implementation: str = "diffusers"  # modelspec.implementation of a LoRA
    marks_prediction: bool = False  # whether empty tensors in a single file say that the model predicts velocity
    earlier_releases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class FileFamily:
    """What files of one family have in common.

    lora_prefixes: how the LoRA names of a part's layers begin. loras_name_checkpoint_paths: whether LoRA files name the U-Net's
    layers as checkpoints do (`input_blocks_4_1_...`), and not as Diffusers does (`down_blocks_1_attentions_0_...`).
    default_prediction: of the model that a LoRA is for, if nothing states it.
    """

    title: str
    layout: Layout
    records: Records
    resolution: Mapping[Prediction, str]
    lora_prefixes: Mapping[str, str]
    loras_name_checkpoint_paths: bool = False
    default_prediction: Prediction | None = None


def _both(text: str) -> Mapping[Prediction, str]:
    return {"epsilon": text, "v": text}


_ONE_TEXT_ENCODER = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
SD1 = FileFamily(
    title="SD 1.x",
    layout=SD1_LAYOUT,
    records=Records(
        v2=False,
        base_model_version={"epsilon": "sd_v1", "v": "sd_v1_v"},
        architecture=_both("stable-diffusion-v1"),
    ),
    resolution=_both("512x512"),
    lora_prefixes=_ONE_TEXT_ENCODER,
    default_prediction="epsilon",
)
SD2 = FileFamily(
    title="SD 2.x",
    layout=SD2_LAYOUT,
    records=Records(
        v2=True,
        base_model_version={"epsilon": "sd_v2", "v": "sd_v2_v"},
        architecture={"epsilon": "stable-diffusion-v2-512", "v": "stable-diffusion-v2-768-v"},
    ),
    resolution={"epsilon": "512x512", "v": "768x768"},
    lora_prefixes=_ONE_TEXT_ENCODER,
)
SDXL = FileFamily(
    title="SDXL",
    layout=SDXL_LAYOUT,
    records=Records(
        v2=False,
        base_model_version=_both("sdxl_base_v1-0"),
        architecture=_both("stable-diffusion-xl-v1-base"),
        implementation=GENERATIVE_MODELS,
        marks_prediction=True,
        earlier_releases={"sdxl_base_v0-9": "SDXL 0.9"},
    ),
    resolution=_both("1024x1024"),
    lora_prefixes={"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    loras_name_checkpoint_paths=True,
)
FILE_FAMILIES: tuple[FileFamily, ...] = (SD1, SD2, SDXL)


def family_of_checkpoint(names: Iterable[str]) -> FileFamily | None:
    """The family of a checkpoint with these tensors, recognised by its text encoders; None if it has none that is known."""
    layout = layout_of(names)
    return next((family for family in FILE_FAMILIES if family.layout == layout), None)


def titles(families: Iterable[FileFamily]) -> str:
    """`SD 1.x or SD 2.x`, say."""
    return " or ".join(family.title for family in families)
