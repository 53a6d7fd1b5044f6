"""Files of options for --config_file: TOML, or JSON with options by name. Files of other kinds are recognised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.text_files import check_texts, parse_json, parse_toml, read_text


def read_option_tables(path: Path) -> dict[str, Any]:
    """The tables of a file of options. Raises UserError, saying what the file is, for a file of another kind."""
    if path.suffix.lower() in (".yaml", ".yml"):
        raise UserError(f"--config_file {path}: YAML is not read; write the options by name as TOML (seed = 1) or JSON")
    text = read_text(path, "--config_file")
    is_json = path.suffix.lower() == ".json" or text.lstrip().startswith("{")
    content = parse_json(text, path) if is_json else parse_toml(text, path)
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected {{"option": value}}, got a {type(content).__name__}')
    check_texts(content, path)
    _reject_other_files(content, path)
    return content


def _reject_other_files(content: Mapping[str, Any], path: Path) -> None:
    if "LoRA_type" in content or "max_resolution" in content:
        raise UserError(
            f"{path} is the JSON file that the kohya_ss GUI saves for itself, with other names and units; give the "
            "config_lora-*.toml that it writes into the output folder, or the words of its button 'Print training command'"
        )
    if {"training_method", "base_model_name"} <= content.keys():
        raise UserError(
            f"{path} is a configuration of OneTrainer, with other names; base_model_name is pretrained_model_name_or_path here, "
            "lora_rank network_dim, lora_alpha network_alpha, batch_size train_batch_size, epochs max_train_epochs, "
            "output_model_destination output_dir and output_name, and concepts are a file for --dataset_config"
        )
    if isinstance(content.get("model"), dict) and isinstance(content.get("adapter"), dict):
        raise UserError(
            f"{path} is a configuration of diffusion-pipe, with other names; checkpoint_path is pretrained_model_name_or_path "
            "here, rank network_dim, lr learning_rate, micro_batch_size_per_gpu train_batch_size, epochs max_train_epochs, and "
            "dataset another kind of file, for --dataset_config"
        )
    if isinstance(content.get("datasets"), list):
        raise UserError(f"{path} is a dataset file; give it as --dataset_config={path}")
    if any(isinstance(table, dict) and isinstance(table.get("args"), dict) for table in content.values()):
        raise UserError(
            f"{path} is a file of LoRA_Easy_Training_Scripts; write the keys of its 'args' tables at the top level, its "
            'network_args and optimizer_args as lists (["algo=locon"]), and its subsets into a file for --dataset_config'
        )
