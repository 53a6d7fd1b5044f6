"""Models from files, folders and the hub: shapes first, then each tensor straight into its module.

Which generation a model is of is told by its text encoder, since widths say nothing of small models: files by its name
(`cond_stage_model.model.` is OpenCLIP, SD 2), Diffusers folders by its activation (OpenCLIP's is the exact GELU).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.formats.compvis import PARTS, CompVisNames
from library.formats.names import VAE_PREFIX, modern_vae_name, renamed, vae_table_for, vae_to_diffusers
from library.formats.tensor_file import TensorFile, open_tensors
from library.models.architecture import read_text_config, read_unet_config, read_vae_config
from library.models.clip import VOCABULARY, load_tokenizer
from library.models.families import check_generation, refuse_other_families, refuse_other_inputs
from library.models.hub import download_model, download_vae
from library.models.parts import StableDiffusion, empty_text_encoder, empty_unet, empty_vae, fill, ready

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

Config = dict[str, Any]
# A tensor of the file, by its name there -> (part, name in the module, tensor), any number of them.
Place = Callable[[str, Tensor], list[tuple[str, str, Tensor]]]

_EMPTY = {"unet": empty_unet, "vae": empty_vae, "text_encoder": empty_text_encoder}
_WEIGHT_FILES = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}


def load_stable_diffusion(
    name_or_path: str,
    *,
    v2: bool = False,
    v_parameterization: bool = False,
    vae: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StableDiffusion:
    """A model from a .safetensors or .ckpt file (CompVis layout), a Diffusers folder or a hub id, in `dtype` on `device`.

    `vae` replaces the VAE; it may be any of these too, or hold a VAE alone. Raises UserError for what is not such a model,
    and if `v2` does not fit it.
    """
    path = Path(name_or_path)
    where = {"dtype": dtype, "device": device}
    if path.is_dir():
        modules, tokenizer = _from_folder(path, v2, v_parameterization, vae is None, where)
    elif path.is_file():
        modules, tokenizer = _from_file(path, v2, v_parameterization, vae is None, where)
    else:
        modules, tokenizer = _from_folder(download_model(name_or_path), v2, v_parameterization, vae is None, where)
    if vae is not None:
        modules["vae"] = load_vae(vae, **where)
    parts = [modules[part] for part in ("text_encoder", "vae", "unet")]
    return StableDiffusion(tokenizer, *parts, v2, v_parameterization, str(name_or_path), path if path.exists() else None)


def load_vae(name_or_path: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> AutoencoderKL:
    """A VAE from a file of its own (CompVis or Diffusers names), a whole model's file, a Diffusers folder or a hub id."""
    path = Path(name_or_path)
    where = {"dtype": dtype, "device": device}
    if path.is_file():
        return _vae_from_file(path, where)
    if not path.is_dir():
        return ready(download_vae(name_or_path, dtype).to(device))
    folder = path if (path / "config.json").is_file() else path / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} holds no VAE: it has neither config.json nor vae/config.json; give a VAE's or model's folder")
    return _part_from_folder("vae", folder, _json(folder / "config.json"), where)


def _from_file(
    path: Path, v2: bool, v_parameterization: bool, with_vae: bool, where: dict[str, Any]
) -> tuple[dict[str, nn.Module], CLIPTokenizer]:
    with open_tensors(path) as file:
        refuse_other_families(path, file.shapes)
        names = CompVisNames(file.shapes)
        if names.unknown:
            raise UserError(f"{path} is no SD 1 or 2 model: its U-Net has the foreign weight {names.unknown[0]}")
        shapes = _shapes_by_part(file, names.place)
        wanted = PARTS if with_vae else ("unet", "text_encoder")
        for part in wanted:
            if not shapes[part]:
                cure = "give a VAE with --vae" if part == "vae" else "fetch the whole model"
                raise UserError(f"{path} holds no {part.replace('_', ' ')}; {cure}")
        check_generation(str(path), names.v2, v2)
        configs = _read_configs(str(path), shapes, wanted, v2, v_parameterization)
        modules = _fill_modules(file, names.place, configs, where)
    return modules, load_tokenizer(v2)


def _read_configs(
    source: str, shapes: dict[str, dict], wanted: tuple[str, ...], v2: bool, v_parameterization: bool
) -> dict[str, Config]:
    try:
        refuse_other_inputs(source, shapes["unet"]["conv_in.weight"][1])
        configs = {
            "unet": read_unet_config(shapes["unet"], v2=v2, v_parameterization=v_parameterization),
            "text_encoder": read_text_config(shapes["text_encoder"], v2=v2),
        }
        if "vae" in wanted:
            configs["vae"] = read_vae_config(shapes["vae"])
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{source} is incomplete: its architecture cannot be read ({error}); fetch the whole model") from error
    return configs


def _vae_from_file(path: Path, where: dict[str, Any]) -> AutoencoderKL:
    with open_tensors(path) as file:
        prefix = VAE_PREFIX if any(name.startswith(VAE_PREFIX) for name in file.shapes) else ""
        names = [name[len(prefix) :] for name in file.shapes if name.startswith(prefix)]
        if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(names):
            raise UserError(f"{path} holds no VAE; give a VAE or a whole model in SD 1 or 2's format")
        in_diffusers_names = any(name.startswith("encoder.down_blocks.") for name in names)
        table = vae_table_for(names)

        def place(name: str, value: Tensor) -> list[tuple[str, str, Tensor]]:
            inside = name[len(prefix) :]
            new = modern_vae_name(inside) if in_diffusers_names else renamed(inside, table)
            kept = name.startswith(prefix) and new is not None and not new.startswith("loss.")
            return [("vae", new, vae_to_diffusers(new, value))] if kept else []

        shapes = _shapes_by_part(file, place)["vae"]
        try:
            config = read_vae_config(shapes)
        except (KeyError, IndexError) as error:
            raise UserError(f"{path} is incomplete: the VAE's architecture cannot be read ({error}); fetch it again") from error
        return _fill_modules(file, place, {"vae": config}, where)["vae"]


def _from_folder(
    folder: Path, v2: bool, v_parameterization: bool, with_vae: bool, where: dict[str, Any]
) -> tuple[dict[str, nn.Module], CLIPTokenizer]:
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a folder without model_index.json, so no Diffusers model; give the model's file")
    pipeline = str(_json(folder / "model_index.json").get("_class_name", ""))
    if any(other in pipeline for other in ("XL", "Diffusion3", "Flux")):
        raise UserError(f"{folder} is a model of another family ({pipeline}); use an SD 1.x or 2.x model")
    wanted = PARTS if with_vae else ("unet", "text_encoder")
    configs = {part: _json(folder / part / "config.json") for part in wanted}
    refuse_other_inputs(str(folder), configs["unet"].get("in_channels", 4))
    check_generation(str(folder), configs["text_encoder"].get("hidden_act") == "gelu", v2)
    _warn_of_prediction_type(folder, v_parameterization)
    modules = {part: _part_from_folder(part, folder / part, configs[part], where) for part in wanted}
    return modules, _folder_tokenizer(folder, configs["text_encoder"], v2)


def _part_from_folder(part: str, folder: Path, config: Config, where: dict[str, Any]) -> nn.Module:
    def place(name: str, value: Tensor) -> list[tuple[str, str, Tensor]]:
        if part == "vae":
            name = modern_vae_name(name)
            value = vae_to_diffusers(name, value)
        name = name.removeprefix("text_model.")
        return [] if name.endswith("position_ids") else [(part, name, value)]

    with open_tensors(_weights_in(folder, _WEIGHT_FILES[part])) as file:
        return _fill_modules(file, place, {part: config}, where)[part]


def _weights_in(folder: Path, stems: tuple[str, ...]) -> Path:
    """The file of weights in a part's folder: full precision before fp16, safetensors before .bin."""
    for suffix in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"):
        for stem in stems:
            if (folder / (stem + suffix)).is_file():
                return folder / (stem + suffix)
    raise UserError(f"{folder} holds no weights: there is no {stems[0]}.safetensors in it; fetch the whole model")


def _folder_tokenizer(folder: Path, text_config: Config, v2: bool) -> CLIPTokenizer:
    """CLIP's tokenizer, unless the folder's text encoder has another vocabulary: then the folder's own."""
    if text_config.get("vocab_size", VOCABULARY) == VOCABULARY:
        return load_tokenizer(v2)
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'tokenizer'} is needed (the vocabulary is not CLIP's) but not readable: {error}") from error


def _warn_of_prediction_type(folder: Path, v_parameterization: bool) -> None:
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        return
    predicts_v = _json(scheduler).get("prediction_type", "epsilon") == "v_prediction"
    if predicts_v and not v_parameterization:
        logger.warning("%s predicts velocity by its scheduler; add --v_parameterization", folder)
    if v_parameterization and not predicts_v:
        logger.warning("%s predicts noise by its scheduler; --v_parameterization is probably wrong", folder)


def _fill_modules(file: TensorFile, place: Place, configs: dict[str, Config], where: dict[str, Any]) -> dict[str, nn.Module]:
    """Modules of these configurations with the file's weights; they are built while a second thread reads."""
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(_read_weights, file, place, tuple(configs), where)
        modules = {part: _build(part, config, file.path) for part, config in configs.items()}
        weights = reading.result()
    for part, module in modules.items():
        fill(module, weights.pop(part), str(file.path))
    return {part: ready(module) for part, module in modules.items()}


def _read_weights(file: TensorFile, place: Place, parts: tuple[str, ...], where: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The weights of `parts` under their names in the modules, read tensor by tensor in the file's order."""
    weights: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for name, shape in file.shapes.items():
        if any(part in weights for part, _, _ in place(name, torch.empty(shape, device="meta"))):
            for part, new, value in place(name, file.read(name, **where)):
                # The thirds of OpenCLIP's joined attention get memory of their own, so saving and training see three weights.
                weights[part][new] = value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
    return weights


def _build(part: str, config: Config, path: Path) -> nn.Module:
    try:
        return _EMPTY[part](config)
    except Exception as error:  # whatever the libraries raise for a configuration they cannot build
        reason, kind = (str(error) or type(error).__name__).splitlines()[0], part.replace("_", " ")
        raise UserError(f"{path}: no {kind} of SD 1 or 2 can be built as its configuration says: {reason}") from error


def _shapes_by_part(file: TensorFile, place: Place) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shape of every weight under its Diffusers name."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {part: {} for part in PARTS}
    for name, shape in file.shapes.items():
        for part, new, value in place(name, torch.empty(shape, device="meta")):
            shapes[part][new] = tuple(value.shape)
    return shapes


def _json(path: Path) -> Config:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; fetch the whole model") from error
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again")
    return content
