"""What the model itself says, written into the options that leave it open: so training, metadata and previews agree."""

from __future__ import annotations

from library.models.loading import Header
from library.training.options import TrainNetworkOptions


def follow_model(options: TrainNetworkOptions, header: Header) -> str | None:
    """Prediction type, zero terminal SNR and the layer of text by the model's header; what was given wins.

    Returns a line about what was set, if anything was.
    """
    model, loss, said = options.model, options.loss, header.said
    model.clip_skip = header.family.text.clip_skip(model.clip_skip)
    if said.prediction != "v" or "v_parameterization" in model.model_fields_set:
        return None
    model.v_parameterization = True
    if "zero_terminal_snr" not in loss.model_fields_set:
        loss.zero_terminal_snr = said.zero_terminal_snr
    return f"the model predicts {said}: trained so; v_parameterization = false in a --config_file says otherwise"
