"""The metadata that the tools write into LoRA files: what was there, what changed, and what the file was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.formats.families import GENERATIVE_MODELS, FileFamily
from library.formats.lora_file import LoraFile
from library.formats.low_rank import LowRank
from library.formats.modelspec import MINIMUM, modelspec
from library.formats.prediction import Prediction, said_by_lora
from library.tools.block_weights import Strength

# Of one training run, so they do not hold for a mixture; all else that the sources agree on is carried over.
_OF_ONE_RUN = ("sshs_", "ss_session_id", "ss_training_started_at", "ss_training_finished_at", "ss_output_name", "ss_network_")


@dataclass(frozen=True)
class Base:
    """The model that a file is, or is for, as far as it is known."""

    family: FileFamily | None
    prediction: Prediction | None

    @property
    def facts(self) -> dict[str, str]:
        """`ss_v2` and `ss_base_model_version`; the latter is left out where what is predicted is not known and decides it."""
        if self.family is None:
            return {}
        version = self._one(self.family.records.base_model_version)
        return {"ss_v2": str(self.family.records.v2)} | ({"ss_base_model_version": version} if version else {})

    def spec(self, resolution: str | None, lora: bool) -> dict[str, str]:
        """The keys of the model specification, without those that nothing says."""
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
        """The value for what is predicted; where that is not known, the one that all have, if there is one."""
        if self.prediction is not None:
            return values[self.prediction]
        return next(iter(values.values())) if len(set(values.values())) == 1 else None


def base_of(sources: Sequence[LoraFile], v_parameterization: bool | None = None) -> Base:
    """What LoRAs are for; v-prediction is what the option says, or else the first of them that says something."""
    family = next((lora.family for lora in sources if lora.family), None)
    said = next((found for lora in sources if (found := said_by_lora(lora.metadata))), None)
    return Base(family, "v" if v_parameterization else said or (family.unsaid if family else None))


def network(modules: Mapping[str, LowRank]) -> dict[str, str]:
    """Rank and alpha, and those of 3x3 convolutions, as the trainer writes them; `Dynamic` where modules differ."""
    plain = [module for module in modules.values() if not module.is_3x3]
    conv = [module for module in modules.values() if module.is_3x3]
    main = plain or conv
    result = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common(str(module.rank) for module in main),
        "ss_network_alpha": _common(str(float(module.alpha)) for module in main),
    }
    if conv and plain:
        args = {"conv_dim": _common(str(m.rank) for m in conv), "conv_alpha": _common(str(float(m.alpha)) for m in conv)}
        result["ss_network_args"] = json.dumps(args)
    return result


def _common(values) -> str:
    values = set(values)
    return values.pop() if len(values) == 1 else "Dynamic"


def merged(
    sources: Sequence[LoraFile],
    strengths: Sequence[Strength],
    modules: Mapping[str, LowRank],
    save_to: Path,
    how: str,
    v_parameterization: bool | None = None,
    block_weights: Sequence[str] | None = None,
) -> dict[str, str]:
    """Metadata of a LoRA made of several: what all agree on, the new rank, and the parts with their ratios and hashes."""
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
    return carried | facts | base.facts | network(modules) | spec


def merged_from(sources: Sequence[LoraFile], strengths: Sequence[Strength]) -> str:
    """What was merged at which ratio, as JSON."""
    parts = [
        {"name": lora.path.name, "ratio": strength.ratio, "sshs_model_hash": lora.metadata.get("sshs_model_hash")}
        for lora, strength in zip(sources, strengths, strict=True)
    ]
    return json.dumps(parts)


def changed(source: LoraFile, modules: Mapping[str, LowRank], comment: str, **facts: str) -> dict[str, str]:
    """Metadata of a LoRA made of one: all that was there, the new rank, and a comment in front of the old one.

    The base model is named too where it was not: web UIs take a file with metadata but without that for one of SD 1.x.
    """
    carried = base_of([source]).facts | {key: value for key, value in source.metadata.items() if not key.startswith("sshs_")}
    old_comment = carried.get("ss_training_comment")
    comment = f"{comment}; {old_comment}" if old_comment and old_comment != "None" else comment
    numbers = network(modules)
    if not all(module.is_lora for module in source.modules.values()):
        carried.pop("ss_network_args", None)  # of another kind of network than the result
    if "ss_network_args" in carried and "ss_network_args" in numbers:
        numbers["ss_network_args"] = _merged_json(carried["ss_network_args"], numbers["ss_network_args"])
    return carried | numbers | {"ss_training_comment": comment} | facts


def _merged_json(old: str, new: str) -> str:
    try:
        return json.dumps(json.loads(old) | json.loads(new))
    except (ValueError, TypeError, RecursionError):  # whatever wrote it, it does not say anything that can be kept
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
    """What `--no_metadata` leaves: only what loaders need to use the file."""
    return {key: value for key, value in metadata.items() if key in MINIMUM}
