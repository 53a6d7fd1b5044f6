"""What a model predicts, noise or velocity, and whether its noise schedule ends in pure noise, as its files state it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from library.formats.tensor_file import TensorFile

Prediction = Literal["epsilon", "v"]  # the output of the denoiser: noise, or velocity

V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"  # empty tensors of single files
_SPELLINGS: Mapping[str, Prediction] = {"v": "v", "v_prediction": "v", "epsilon": "epsilon"}


@dataclass(frozen=True)
class StatedPrediction:
    """The prediction that a model's files state; `prediction` None: they state none. source: the tensor or metadata key."""

    prediction: Prediction | None = None
    zero_terminal_snr: bool = False
    source: str = ""

    def __str__(self) -> str:
        """`velocity, zero terminal SNR (tensor v_pred)`."""
        what = "velocity" if self.prediction == "v" else "noise"
        return f"{what}{', zero terminal SNR' if self.zero_terminal_snr else ''} ({self.source})"


def prediction_of_file(file: TensorFile) -> StatedPrediction:
    """By mark tensors first, then by metadata, which conversion and merging may copy from another model."""
    zero_snr = ZERO_SNR_MARK in file.shapes
    if V_MARK in file.shapes:
        return StatedPrediction("v", zero_snr, f"tensor {V_MARK}")
    prediction = _SPELLINGS.get(file.metadata.get("modelspec.prediction_type", ""))
    source = "modelspec.prediction_type" if prediction else f"tensor {ZERO_SNR_MARK}"
    return StatedPrediction(prediction or ("v" if zero_snr else None), zero_snr, source)


def schedule_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `NoiseProcess` that a scheduler's configuration sets."""
    names = {"timestep_spacing": "spacing", "steps_offset": "steps_offset"}
    if config.get("beta_schedule") == "scaled_linear":  # the only form that `NoiseProcess` has
        names |= {"beta_start": "beta_start", "beta_end": "beta_end"}
    return {field: config[name] for name, field in names.items() if config.get(name) is not None}


def prediction_of_lora(metadata: Mapping[str, str]) -> Prediction | None:
    """By a LoRA's metadata: by `ss_base_model_version` for SD 1.x and 2.x; in other families it does not distinguish them."""
    version = metadata.get("ss_base_model_version", "")
    if version.startswith("sd_"):
        return "v" if version.endswith("_v") else "epsilon"
    return _SPELLINGS.get(metadata.get("modelspec.prediction_type", ""))


def prediction_of_scheduler(config: Mapping[str, Any]) -> StatedPrediction:
    """By the scheduler's configuration in a Diffusers folder."""
    prediction = _SPELLINGS.get(config.get("prediction_type", "epsilon"))
    return StatedPrediction(prediction, bool(config.get("rescale_betas_zero_snr")), "its scheduler")
