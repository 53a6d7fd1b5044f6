"""What a file says it is: the metadata that loaders and web interfaces read from LoRAs and checkpoints.

`ss_*` are the trainer's keys, `modelspec.*` those of the Stability AI model specification 1.0.1; all values are text.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping

# What loaders need to use a LoRA file; all that --no_metadata leaves.
MINIMUM = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_v2", "ss_base_model_version")
_V = "_v"


def base_model_version(v2: bool, v_parameterization: bool) -> str:
    """`ss_base_model_version`: `sd_v1`, `sd_v1_v`, `sd_v2` or `sd_v2_v`."""
    return ("sd_v2" if v2 else "sd_v1") + (_V if v_parameterization else "")


def says_v(version: str | None) -> bool:
    """Whether an `ss_base_model_version` says that the model predicts v."""
    return bool(version and version.endswith(_V))


def architecture(v2: bool, v_parameterization: bool, lora: bool = True) -> str:
    """`modelspec.architecture`."""
    base = f"stable-diffusion-v2-{'768-v' if v_parameterization else '512'}" if v2 else "stable-diffusion-v1"
    return base + ("/lora" if lora else "")


def prediction_type(v_parameterization: bool) -> str:
    """`modelspec.prediction_type`."""
    return "v" if v_parameterization else "epsilon"


def modelspec(keys: Mapping[str, str]) -> dict[str, str]:
    """These keys as `modelspec.*`, with the version of the specification and the time."""
    spec = {"sai_model_spec": "1.0.1", "date": datetime.datetime.now().isoformat(timespec="seconds"), **keys}
    return {f"modelspec.{key}": value for key, value in spec.items()}
