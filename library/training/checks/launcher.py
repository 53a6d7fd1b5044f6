"""Engines that `accelerate launch` asks for in the environment and that are not supported here."""

from __future__ import annotations

import os

from library.errors import UserError

ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def check_launcher() -> None:
    """UserError if accelerate's configuration asks for an engine that takes the training loop or the model over."""
    for variable, engine in ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise UserError(
                f"accelerate's configuration asks for {engine}, which is not supported; a LoRA run fits one card: answer no to "
                f"{engine} in `accelerate config`, or give `accelerate launch` another file with --config_file"
            )
