"""What a LoRA's metadata say of the model that it was trained on, compared with the one that it is used with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from library.files import legacy_hash_of_file, read_safetensors_metadata
from library.formats.families import Records
from library.formats.prediction import Prediction, prediction_of_lora

_PREDICTED: Mapping[Prediction, str] = {"epsilon": "noise", "v": "velocity"}


def lora_metadata(file: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; other files have none."""
    is_safetensors = file.suffix.lower() == ".safetensors" and file.is_file()
    return read_safetensors_metadata(file) if is_safetensors else {}


def unlike_base(metadata: Mapping[str, str], records: Records, prediction: Prediction | None) -> Iterator[str]:
    """Why a LoRA will not act as it did in training, as clauses that follow the file's name; nothing where nothing says so.

    records, prediction: of the model that it is used with; prediction None: nothing says it.
    """
    trained_on = f"was trained on {metadata.get('ss_sd_model_name') or 'a model'}"
    release = records.earlier_releases.get(metadata.get("ss_base_model_version", ""))
    if release:
        yield f"{trained_on} of {release}, whose weights are others: it may look overtrained; lower its strength"
    stated = prediction_of_lora(metadata)
    if stated and prediction and stated != prediction:
        yield (
            f"{trained_on} that predicts {_PREDICTED[stated]}, and this model predicts {_PREDICTED[prediction]}: "
            "it may act otherwise than in training"
        )


def trained_on_another_file(metadata: Mapping[str, str], model: Path) -> str | None:
    """The name of the single file that a LoRA was trained on, if the hash in its metadata is not that of `model`."""
    name, known = metadata.get("ss_sd_model_name"), metadata.get("ss_sd_model_hash")
    is_other = name and known and model.is_file() and legacy_hash_of_file(model) != known
    return name if is_other else None
