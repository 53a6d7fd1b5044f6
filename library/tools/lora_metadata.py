"""The metadata that the tools write into LoRA files: what was there, what changed, and what the file was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from library.formats.lora_file import LoraFile
from library.formats.low_rank import LowRank
from library.formats.modelspec import MINIMUM, architecture, base_model_version, modelspec, prediction_type, says_v

# Of one training run, so they do not hold for a mixture; all else that the sources agree on is carried over.
_OF_ONE_RUN = ("sshs_", "ss_session_id", "ss_training_started_at", "ss_training_finished_at", "ss_output_name", "ss_network_")


def base_model_of(sources: Sequence[LoraFile], v_parameterization: bool | None) -> dict[str, str]:
    """`ss_v2` and `ss_base_model_version`; v-prediction is what the option says, or else the sources.

    SD 2.x files that do not say what they predict are not marked as one or the other.
    """
    said = next((lora.metadata["ss_base_model_version"] for lora in sources if "ss_base_model_version" in lora.metadata), None)
    v2 = next((lora.v2 for lora in sources if lora.v2 is not None), None)
    if v2 is None:
        return {}
    if v_parameterization is None and said is None and v2:
        return {"ss_v2": "True"}
    predicts_v = says_v(said) if v_parameterization is None else v_parameterization
    return {"ss_v2": str(v2), "ss_base_model_version": base_model_version(v2, predicts_v)}


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
    ratios: Sequence[float],
    modules: Mapping[str, LowRank],
    save_to: Path,
    how: str,
    v_parameterization: bool | None = None,
) -> dict[str, str]:
    """Metadata of a LoRA made of several: what all agree on, the new rank, and the parts with their ratios and hashes."""
    first, *others = [lora.metadata for lora in sources]
    carried = {
        key: value
        for key, value in first.items()
        if key.startswith("ss_") and not key.startswith(_OF_ONE_RUN) and all(other.get(key) == value for other in others)
    }
    comment = f"{how}: " + " + ".join(f"{ratio:g} x {lora.path.name}" for lora, ratio in zip(sources, ratios, strict=True))
    facts = {"ss_merged_from": merged_from(sources, ratios), "ss_training_comment": comment, "ss_output_name": save_to.stem}
    facts |= base_model_of(sources, v_parameterization) | network(modules)
    return carried | facts | modelspec_of(save_to, facts, [lora.title for lora in sources], first.get("modelspec.resolution"))


def merged_from(sources: Sequence[LoraFile], ratios: Sequence[float]) -> str:
    """What was merged at which ratio, as JSON."""
    parts = [
        {"name": lora.path.name, "ratio": ratio, "sshs_model_hash": lora.metadata.get("sshs_model_hash")}
        for lora, ratio in zip(sources, ratios, strict=True)
    ]
    return json.dumps(parts)


def changed(source: LoraFile, modules: Mapping[str, LowRank], comment: str, **facts: str) -> dict[str, str]:
    """Metadata of a LoRA made of one: all that was there, the new rank, and a comment in front of the old one."""
    carried = {key: value for key, value in source.metadata.items() if not key.startswith("sshs_")}
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
    save_to: Path, facts: Mapping[str, str], titles: Sequence[str], resolution: str | None = None, lora: bool = True
) -> dict[str, str]:
    """The `modelspec.*` keys. Prediction type and resolution are left out where nothing says them."""
    version = facts.get("ss_base_model_version")
    v2, predicts_v = facts.get("ss_v2") == "True", says_v(version)
    keys = {
        "implementation": "diffusers" if lora else "https://github.com/Stability-AI/generative-models",
        "title": save_to.stem,
        "merged_from": ", ".join(titles),
    }
    if "ss_v2" in facts and (version or not v2):
        keys["architecture"] = architecture(v2, predicts_v, lora)
        keys["prediction_type"] = prediction_type(predicts_v)
        keys["resolution"] = resolution or ("768x768" if v2 and predicts_v else "512x512")
    return modelspec(keys)


def without_modelspec(metadata: Mapping[str, str]) -> dict[str, str]:
    """What `--no_metadata` leaves: only what loaders need to use the file."""
    return {key: value for key, value in metadata.items() if key in MINIMUM}
