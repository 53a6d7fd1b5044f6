"""The metadata of LoRA files that the tools write: what was there, what changed, and what the file was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.formats.families import GENERATIVE_MODELS, FileFamily
from library.formats.lora_file import LoraFile
from library.formats.low_rank import LowRank
from library.formats.modelspec import MINIMUM, modelspec
from library.formats.prediction import Prediction, prediction_of_lora
from library.formats.tensor_file import TensorFile
from library.tools.block_weights import Strength

# Keys about one training run, which do not hold for a merged file. Other keys that all sources agree on are copied.
_OF_ONE_RUN = ("sshs_", "ss_session_id", "ss_training_started_at", "ss_training_finished_at", "ss_output_name", "ss_network_")


@dataclass(frozen=True)
class Base:
    """The model that a file is, or is for; None where it is not known."""

    family: FileFamily | None
    prediction: Prediction | None

    @property
    def facts(self) -> dict[str, str]:
        """`ss_v2` and `ss_base_model_version`; the latter is left out if it depends on an unknown prediction."""
        if self.family is None:
            return {}
        version = self._one(self.family.records.base_model_version)
        return {"ss_v2": str(self.family.records.v2)} | ({"ss_base_model_version": version} if version else {})

    def spec(self, resolution: str | None, lora: bool) -> dict[str, str]:
        """The keys of the model specification whose values are known."""
        if self.family is None:
            return {}
        architecture = self._one(self.family.records.architecture)
        found = {
            "architecture": architecture and architecture + ("/lora" if lora else ""),
            "prediction_type": self.prediction,
            "resolution": resolution or self._one(self.family.resolution),
        }
        return {key: value for key, value in found.items() if value}

    def _one(self, values: Mapping[Prediction, str]) -> str | None:
        """The value for the prediction; if that is not known, the value that all predictions have, or None."""
        if self.prediction is not None:
            return values[self.prediction]
        return next(iter(values.values())) if len(set(values.values())) == 1 else None


def base_of(sources: Sequence[LoraFile], v_parameterization: bool | None = None) -> Base:
    """The model that LoRAs are for. The prediction is that of the option, or of the first LoRA that states one."""
    family = next((lora.family for lora in sources if lora.family), None)
    stated = next((found for lora in sources if (found := prediction_of_lora(lora.metadata))), None)
    return Base(family, "v" if v_parameterization else stated or (family.default_prediction if family else None))


def network_metadata(modules: Mapping[str, LowRank]) -> dict[str, str]:
    """Rank and alpha, also of 3x3 convolutions, with the trainer's keys; `Dynamic` if modules differ."""
    found = {(module.is_3x3, str(module.rank), str(float(module.alpha))) for module in modules.values()}
    plain, conv = ([numbers for is_3x3, *numbers in found if is_3x3 is kind] for kind in (False, True))
    rank, alpha = map(_common, zip(*(plain or conv), strict=True))
    result = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha}
    if conv and plain:
        conv_rank, conv_alpha = map(_common, zip(*conv, strict=True))
        result["ss_network_args"] = json.dumps({"conv_dim": conv_rank, "conv_alpha": conv_alpha})
    return result


def _common(values) -> str:
    values = set(values)
    return values.pop() if len(values) == 1 else "Dynamic"


def merged_metadata(
    sources: Sequence[LoraFile],
    strengths: Sequence[Strength],
    modules: Mapping[str, LowRank],
    save_to: Path,
    how: str,
    v_parameterization: bool | None = None,
    block_weights: Sequence[str] | None = None,
) -> dict[str, str]:
    """Metadata of a LoRA merged from several: the keys that all agree on, the new rank, and sources with ratios and hashes."""
    first, *others = [lora.metadata for lora in sources]
    carried = {
        key: value
        for key, value in first.items()
        if key.startswith("ss_") and not key.startswith(_OF_ONE_RUN) and all(other.get(key) == value for other in others)
    }
    terms = [f"{strength.ratio:g} x {lora.path.name}" for lora, strength in zip(sources, strengths, strict=True)]
    comment = f"{how}: {' + '.join(terms)}" + (f"; by block: {' | '.join(block_weights)}" if block_weights else "")
    base = base_of(sources, v_parameterization)
    facts = {"ss_merged_from": merged_from(sources, strengths), "ss_training_comment": comment, "ss_output_name": save_to.stem}
    spec = modelspec_of(save_to, base, [lora.title for lora in sources], first.get("modelspec.resolution"))
    return carried | facts | base.facts | network_metadata(modules) | spec


def merged_model_metadata(
    model: TensorFile, base: Base, sources: Sequence[LoraFile], strengths: Sequence[Strength], save_to: Path
) -> dict[str, str]:
    """Metadata of a model with LoRAs merged in: that of the model, its new specification, and the sources."""
    titles = [model.metadata.get("modelspec.title") or model.path.stem, *(lora.title for lora in sources)]
    spec = modelspec_of(save_to, base, titles, model.metadata.get("modelspec.resolution"), lora=False)
    return dict(model.metadata) | spec | {"ss_merged_from": merged_from(sources, strengths)}


def merged_from(sources: Sequence[LoraFile], strengths: Sequence[Strength]) -> str:
    """The merged files and their ratios, as JSON."""
    parts = [
        {"name": lora.path.name, "ratio": strength.ratio, "sshs_model_hash": lora.metadata.get("sshs_model_hash")}
        for lora, strength in zip(sources, strengths, strict=True)
    ]
    return json.dumps(parts)


def changed_metadata(source: LoraFile, modules: Mapping[str, LowRank], comment: str, **facts: str) -> dict[str, str]:
    """Metadata of a LoRA made from one: the keys of the source, the new rank, and a comment before the old one.

    The base model is added if it is missing: web UIs take a file with metadata but without a base model for one of SD 1.x.
    """
    carried = base_of([source]).facts | {key: value for key, value in source.metadata.items() if not key.startswith("sshs_")}
    old_comment = carried.get("ss_training_comment")
    comment = f"{comment}; {old_comment}" if old_comment and old_comment != "None" else comment
    ranks = network_metadata(modules)
    if not all(module.is_lora for module in source.modules.values()):
        carried.pop("ss_network_args", None)  # the result is another kind of network
    if "ss_network_args" in carried and "ss_network_args" in ranks:
        ranks["ss_network_args"] = _merged_json(carried["ss_network_args"], ranks["ss_network_args"])
    return carried | ranks | {"ss_training_comment": comment} | facts


def _merged_json(old: str, new: str) -> str:
    try:
        return json.dumps(json.loads(old) | json.loads(new))
    except (ValueError, TypeError, RecursionError):  # not a JSON object, so nothing of it can be kept
        return new


def modelspec_of(
    save_to: Path, base: Base, titles: Sequence[str], resolution: str | None = None, lora: bool = True
) -> dict[str, str]:
    """The `modelspec.*` keys."""
    implementation = base.family.records.implementation if base.family else "diffusers"
    keys = {
        "implementation": implementation if lora else GENERATIVE_MODELS,
        "title": save_to.stem,
        "merged_from": ", ".join(titles),
    }
    return modelspec(keys | base.spec(resolution, lora))


def without_modelspec(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with `--no_metadata`: only the keys that loaders need."""
    return {key: value for key, value in metadata.items() if key in MINIMUM}
