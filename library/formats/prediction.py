"""What a model's files say it predicts: noise or velocity, and whether its noise schedule ends in pure noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from library.formats.tensor_file import TensorFile

Prediction = Literal["epsilon", "v"]  # what a model answers with: the noise, or the velocity

V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"  # empty tensors of single files
_SPELLINGS: Mapping[str, Prediction] = {"v": "v", "v_prediction": "v", "epsilon": "epsilon"}


@dataclass(frozen=True)
class Said:
    """`prediction` is None where nothing is said. where: what says it."""

    prediction: Prediction | None = None
    zero_terminal_snr: bool = False
    where: str = ""

    def __str__(self) -> str:
        """`velocity, zero terminal SNR (tensor v_pred)`."""
        what = "velocity" if self.prediction == "v" else "noise"
        return f"{what}{', zero terminal SNR' if self.zero_terminal_snr else ''} ({self.where})"


def said_by_file(file: TensorFile) -> Said:
    """Markers before metadata: those who convert and merge copy the latter from other models."""
    zero_snr = ZERO_SNR_MARK in file.shapes
    if V_MARK in file.shapes:
        return Said("v", zero_snr, f"tensor {V_MARK}")
    prediction = _SPELLINGS.get(file.metadata.get("modelspec.prediction_type", ""))
    where = "modelspec.prediction_type" if prediction else f"tensor {ZERO_SNR_MARK}"
    return Said(prediction or ("v" if zero_snr else None), zero_snr, where)


def schedule_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of a scheduler says of the noise process, by the fields of `NoiseProcess`."""
    names = {"timestep_spacing": "spacing", "steps_offset": "steps_offset"}
    if config.get("beta_schedule") == "scaled_linear":  # the only form that `NoiseProcess` has
        names |= {"beta_start": "beta_start", "beta_end": "beta_end"}
    return {field: config[name] for name, field in names.items() if config.get(name) is not None}


def said_by_lora(metadata: Mapping[str, str]) -> Prediction | None:
    """By the metadata of a LoRA: of SD 1.x and 2.x `ss_base_model_version` tells, of others it is the same for both."""
    version = metadata.get("ss_base_model_version", "")
    if version.startswith("sd_"):
        return "v" if version.endswith("_v") else "epsilon"
    return _SPELLINGS.get(metadata.get("modelspec.prediction_type", ""))


def said_by_scheduler(config: Mapping[str, Any]) -> Said:
    """By the configuration of a Diffusers folder's scheduler."""
    prediction = _SPELLINGS.get(config.get("prediction_type", "epsilon"))
    return Said(prediction, bool(config.get("rescale_betas_zero_snr")), "its scheduler")
