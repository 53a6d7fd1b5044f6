"""What a file says it is: the metadata that loaders and web interfaces read from LoRAs and checkpoints.

`ss_*` are the trainer's keys, `modelspec.*` those of the Stability AI model specification 1.0.1; all values are text.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping

# What loaders need to use a LoRA file; all that --no_metadata leaves.
MINIMUM = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_v2", "ss_base_model_version")


def modelspec(keys: Mapping[str, str]) -> dict[str, str]:
    """These keys as `modelspec.*`, with the version of the specification and the time."""
    spec = {"sai_model_spec": "1.0.1", "date": datetime.datetime.now().isoformat(timespec="seconds"), **keys}
    return {f"modelspec.{key}": value for key, value in spec.items()}
