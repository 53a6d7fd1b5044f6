"""Options that were left open, filled in from the model's header, so that training, metadata and previews agree."""

from __future__ import annotations

from typing import Any

from library.models.loading import Header
from library.training.options import LossOptions, ModelOptions


def following_model(model: ModelOptions, loss: LossOptions, header: Header) -> tuple[ModelOptions, LossOptions, str | None]:
    """Both with prediction type, zero terminal SNR and layer of text by the model's header; what was given wins.

    Also a line about the prediction type, if it was set.
    """
    stated = header.stated
    of_model: dict[str, Any] = {"clip_skip": header.family.text.clip_skip(model.clip_skip)}
    of_loss: dict[str, Any] = {}
    line = None
    if stated.prediction == "v" and "v_parameterization" not in model.model_fields_set:
        of_model["v_parameterization"] = True
        if "zero_terminal_snr" not in loss.model_fields_set:
            of_loss["zero_terminal_snr"] = stated.zero_terminal_snr
        line = f"the model predicts {stated}: trained so; v_parameterization = false in a --config_file says otherwise"
    return model.model_copy(update=of_model), loss.model_copy(update=of_loss), line
