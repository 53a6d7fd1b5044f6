"""Models from files, folders and the hub: shapes first, then each tensor straight into its module."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.diffusion.process import Prediction
from library.errors import UserError
from library.formats.compvis import SingleFileNames
from library.formats.names import VAE_PREFIX, modern_vae_name, renamed, vae_table_for, vae_to_diffusers
from library.formats.tensor_file import TensorFile, open_tensors
from library.models.clip import VOCABULARY, load_tokenizer
from library.models.family import Config, Family, Model, Part, Shapes
from library.models.hub import download_configs, download_model, download_vae
from library.models.modules import TEXT_MODEL, fill, ready, weights_of
from library.models.registry import check_v2, detect, detect_folder, refuse_other_inputs
from library.models.vae import KL_VAE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

# A tensor of the file, by its name there -> (part, name in the module, tensor), any number of them.
Place = Callable[[str, Tensor], list[tuple[str, str, Tensor]]]
Where = dict[str, Any]  # dtype and device


@dataclass(frozen=True)
class Header:
    """What is known of a model before its weights are read: its family, and the shapes of each part by Diffusers names."""

    family: Family
    shapes: Mapping[str, Shapes]


def read_header(name_or_path: str, v2: bool | None = None) -> Header:
    """The header of a model file, folder or hub id. UserError for what is no model, or if `v2` is given and does not fit."""
    path = Path(name_or_path)
    if path.is_file():
        with open_tensors(path) as file:
            family = _family_of_file(path, file.shapes, v2)
            return Header(family, _shapes_by_part(file, SingleFileNames(file.shapes, family.layout).place, family))
    folder = path if path.is_dir() else download_configs(name_or_path)
    family, configs = _family_of_folder(folder, v2)
    shapes = {}
    for part in family.parts:
        if part.name in configs:
            weights = weights_of(_build(part, configs[part.name], folder))
            shapes[part.name] = {name: tuple(value.shape) for name, value in weights.items()}
    return Header(family, shapes)


def load_stable_diffusion(
    name_or_path: str,
    *,
    v2: bool | None = None,
    prediction: Prediction = "epsilon",
    vae: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Model:
    """A model from a .safetensors or .ckpt file (CompVis layout), a Diffusers folder or a hub id, in `dtype` on `device`.

    `vae` replaces the VAE; it may be any of these too, or hold a VAE alone. Raises UserError for what is not such a model,
    and if `v2` is given and does not fit it.
    """
    path = Path(name_or_path)
    where = {"dtype": dtype, "device": device}
    if path.is_file():
        family, modules, tokenizers = _from_file(path, v2, prediction, vae is None, where)
    else:
        folder = path if path.is_dir() else download_model(name_or_path)
        family, modules, tokenizers = _from_folder(folder, v2, prediction, vae is None, where)
    if vae is not None:
        modules["vae"] = load_vae(vae, **where)
    return Model(family, modules, tokenizers, prediction, str(name_or_path), path if path.exists() else None)


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
    return _part_from_folder(KL_VAE, folder, _json(folder / "config.json"), where)


def _family_of_file(path: Path, shapes: Shapes, v2: bool | None) -> Family:
    family = detect(path, shapes)
    if v2 is not None:
        check_v2(str(path), family, v2)
    return family


def _from_file(
    path: Path, v2: bool | None, prediction: Prediction, with_vae: bool, where: Where
) -> tuple[Family, dict[str, nn.Module], list[Any]]:
    with open_tensors(path) as file:
        family = detect(path, file.shapes)
        names = SingleFileNames(file.shapes, family.layout)
        if names.unknown:
            raise UserError(f"{path} is no {family.title} model: its U-Net has the foreign weight {names.unknown[0]}")
        shapes = _shapes_by_part(file, names.place, family)
        wanted = [part for part in family.parts if with_vae or part.role != "vae"]
        for part in wanted:
            if not shapes[part.name]:
                cure = "give a VAE with --vae" if part.role == "vae" else "fetch the whole model"
                raise UserError(f"{path} holds no {part.name.replace('_', ' ')}; {cure}")
        if v2 is not None:
            check_v2(str(path), family, v2)
        configs = _read_configs(str(path), family, shapes, wanted, prediction)
        modules = _fill_modules(file, names.place, {part.name: (part, configs[part.name]) for part in wanted}, where)
    return family, modules, [load_tokenizer(padding) for padding in family.text.paddings]


def _read_configs(
    source: str, family: Family, shapes: Mapping[str, Shapes], wanted: list[Part], prediction: Prediction
) -> dict[str, Config]:
    try:
        refuse_other_inputs(source, family, shapes["unet"]["conv_in.weight"][1])
        return {part.name: part.read_config(shapes[part.name], prediction) for part in wanted}
    except (KeyError, IndexError, ValueError, StopIteration) as error:
        raise UserError(f"{source} is incomplete: its architecture cannot be read ({error}); fetch the whole model") from error


def _vae_from_file(path: Path, where: Where) -> AutoencoderKL:
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
            config = KL_VAE.read_config(shapes, "epsilon")
        except (KeyError, IndexError) as error:
            raise UserError(f"{path} is incomplete: the VAE's architecture cannot be read ({error}); fetch it again") from error
        return _fill_modules(file, place, {"vae": (KL_VAE, config)}, where)["vae"]


def _family_of_folder(folder: Path, v2: bool | None) -> tuple[Family, dict[str, Config]]:
    """The family of a Diffusers folder, and the configurations of the parts that are in it."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a folder without model_index.json, so no Diffusers model; give the model's file")
    pipeline = str(_json(folder / "model_index.json").get("_class_name", ""))
    files = sorted(folder.glob("*/config.json"))
    configs = {file.parent.name: _json(file) for file in files}
    family = detect_folder(folder, pipeline, configs)
    refuse_other_inputs(str(folder), family, configs.get("unet", {}).get("in_channels", family.latents.channels))
    if v2 is not None:
        check_v2(str(folder), family, v2)
    return family, configs


def _from_folder(
    folder: Path, v2: bool | None, prediction: Prediction, with_vae: bool, where: Where
) -> tuple[Family, dict[str, nn.Module], list[Any]]:
    family, configs = _family_of_folder(folder, v2)
    _warn_of_prediction_type(folder, prediction)
    wanted = [part for part in family.parts if with_vae or part.role != "vae"]
    configs |= {part.name: _json(folder / part.name / "config.json") for part in wanted if part.name not in configs}
    modules = {part.name: _part_from_folder(part, folder / part.name, configs[part.name], where) for part in wanted}
    texts = zip(family.text_parts, family.text.paddings, strict=True)
    tokenizers = [_folder_tokenizer(folder / part.tokenizer, configs[part.name], padding) for part, padding in texts]
    return family, modules, tokenizers


def _part_from_folder(part: Part, folder: Path, config: Config, where: Where) -> nn.Module:
    def place(name: str, value: Tensor) -> list[tuple[str, str, Tensor]]:
        if part.role == "vae":
            name = modern_vae_name(name)
            value = vae_to_diffusers(name, value)
        name = name.removeprefix(TEXT_MODEL)
        return [] if name.endswith("position_ids") else [(part.name, name, value)]

    with open_tensors(_weights_in(folder, part.weight_files)) as file:
        return _fill_modules(file, place, {part.name: (part, config)}, where)[part.name]


def _weights_in(folder: Path, stems: tuple[str, ...]) -> Path:
    """The file of weights in a part's folder: full precision before fp16, safetensors before .bin."""
    for suffix in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"):
        for stem in stems:
            if (folder / (stem + suffix)).is_file():
                return folder / (stem + suffix)
    raise UserError(f"{folder} holds no weights: there is no {stems[0]}.safetensors in it; fetch the whole model")


def _folder_tokenizer(folder: Path, text_config: Config, padding: str) -> CLIPTokenizer:
    """CLIP's tokenizer, unless the folder's text encoder has another vocabulary: then the folder's own."""
    if text_config.get("vocab_size", VOCABULARY) == VOCABULARY:
        return load_tokenizer(padding)
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is needed (the vocabulary is not CLIP's) but not readable: {error}") from error


def _warn_of_prediction_type(folder: Path, prediction: Prediction) -> None:
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        return
    predicts_v = _json(scheduler).get("prediction_type", "epsilon") == "v_prediction"
    if predicts_v and prediction == "epsilon":
        logger.warning("%s predicts velocity by its scheduler; add --v_parameterization", folder)
    if prediction == "v" and not predicts_v:
        logger.warning("%s predicts noise by its scheduler; --v_parameterization is probably wrong", folder)


def _fill_modules(file: TensorFile, place: Place, parts: dict[str, tuple[Part, Config]], where: Where) -> dict[str, nn.Module]:
    """Modules of these parts and configurations with the file's weights; they are built while a second thread reads."""
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(_read_weights, file, place, tuple(parts), where)
        modules = {name: _build(part, config, file.path) for name, (part, config) in parts.items()}
        weights = reading.result()
    for name, module in modules.items():
        fill(module, weights.pop(name), str(file.path), parts[name][0].title)
    return {name: ready(module) for name, module in modules.items()}


def _read_weights(file: TensorFile, place: Place, parts: tuple[str, ...], where: Where) -> dict[str, dict[str, Tensor]]:
    """The weights of `parts` under their names in the modules, read tensor by tensor in the file's order."""
    weights: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for name, shape in file.shapes.items():
        if any(part in weights for part, _, _ in place(name, torch.empty(shape, device="meta"))):
            for part, new, value in place(name, file.read(name, **where)):
                # The thirds of OpenCLIP's joined attention get memory of their own, so saving and training see three weights.
                weights[part][new] = value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
    return weights


def _build(part: Part, config: Config, path: Path) -> nn.Module:
    try:
        return part.build(config)
    except Exception as error:  # whatever the libraries raise for a configuration they cannot build
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no {part.name.replace('_', ' ')} can be built as its configuration says: {reason}") from error


def _shapes_by_part(file: TensorFile, place: Place, family: Family | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shape of every weight under its Diffusers name; of the VAE alone without a family."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {part.name: {} for part in (family.parts if family else [KL_VAE])}
    for name, shape in file.shapes.items():
        for part, new, value in place(name, torch.empty(shape, device="meta")):
            shapes[part][new] = tuple(value.shape)
    return shapes


def _json(path: Path) -> Config:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; fetch the whole model") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again")
    return content
