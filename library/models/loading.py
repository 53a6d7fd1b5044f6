"""Models from files, folders and the hub: shapes first, then each tensor directly into its module."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.diffusion.process import Prediction
from library.errors import UserError
from library.formats.compvis import SingleFileNames
from library.formats.names import VAE_PREFIX, modern_vae_name, renamed, vae_table_for, vae_to_diffusers
from library.formats.prediction import StatedPrediction, prediction_of_file, prediction_of_scheduler, schedule_of
from library.formats.shards import ShardedFile
from library.formats.tensor_file import TensorFile, open_tensors
from library.models.clip import VOCABULARY, load_tokenizer
from library.models.family import Config, Family, Model, Part, Shapes
from library.models.hub import download_configs, download_model, download_vae
from library.models.modules import TEXT_MODEL, fill, for_inference, weights_of
from library.models.registry import check_v2, detect, detect_folder, reject_other_conditions, reject_other_inputs
from library.models.vae import KL_VAE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

READERS = 2  # threads that read a file of weights

# Weights of CLIP that some programs write to the folder of a text encoder which does not use them.
UNUSED_CLIP_WEIGHTS = ("text_projection", "logit_scale", "vision_model.", "visual_projection")

# (name in the file, tensor) -> any number of (part, name in the module, tensor).
ToParts = Callable[[str, Tensor], list[tuple[str, str, Tensor]]]
TensorOptions = dict[str, Any]  # dtype, device


class Reading:
    """The weights of some parts, which threads read from an open file in the order of its bytes. Use it in a `with` block."""

    def __init__(self, file: TensorFile, to_parts: ToParts, parts: Collection[str], to: TensorOptions) -> None:
        self.source, self._torch_threads = file.path, torch.get_num_threads()
        wanted = [
            name for name in file.shapes if any(part in parts for part, _, _ in to_parts(name, _without_content(file, name)))
        ]
        # One thread of torch in each: threads that share one conversion wait for each other while the system clears new memory.
        self._readers = ThreadPoolExecutor(READERS, initializer=torch.set_num_threads, initargs=(1,))
        self._found = self._readers.map(partial(_read_weight, file, to_parts, to), wanted)

    def fill(self, parts: Mapping[str, tuple[Part, Config]]) -> dict[str, nn.Module]:
        """Modules of these parts and configurations with the weights."""
        modules = {name: _build(part, config, self.source) for name, (part, config) in parts.items()}
        weights: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
        for part, name, value in chain.from_iterable(self._found):
            weights[part][name] = value
        for name, module in modules.items():
            fill(module, weights.pop(name), str(self.source), parts[name][0].title)
        return {name: for_inference(module) for name, module in modules.items()}

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *error: object) -> None:
        self._readers.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)


class ModelReading:
    """The file of a whole model, whose weights threads begin to read at once. Use it in a `with` block.

    Raises UserError if it is no model's file.
    """

    def __init__(self, path: Path, with_vae: bool, dtype: torch.dtype | None, device: torch.device | str) -> None:
        self.path = path
        with ExitStack() as opened:
            self.file = opened.enter_context(open_tensors(path))
            self.family = detect(path, self.file.shapes)
            self.names = SingleFileNames(self.file.shapes, self.family.layout)
            self.parts = [part for part in self.family.parts if with_vae or part.role != "vae"]
            named = {part.name for part in self.parts}
            self.weights = opened.enter_context(
                Reading(self.file, self.names.to_parts, named, {"dtype": dtype, "device": device})
            )
            self._opened = opened.pop_all()

    def __enter__(self) -> ModelReading:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()


@dataclass(frozen=True)
class Header:
    """A model without its weights: its family, and the shapes of each part by Diffusers names."""

    family: Family
    shapes: Mapping[str, Shapes]
    stated: StatedPrediction = StatedPrediction()


def read_header(name_or_path: str, v2: bool | None = None) -> Header:
    """The header of a model file, folder or hub id. Raises UserError if it is no model, or contradicts `v2`."""
    path = Path(name_or_path)
    if path.is_file():
        with open_tensors(path) as file:
            family = detect(path, file.shapes)
            check_v2(str(path), family, v2)
            shapes = _shapes_by_part(file, SingleFileNames(file.shapes, family.layout).to_parts, family)
            return Header(family, shapes, prediction_of_file(file))
    folder = path if path.is_dir() else download_configs(name_or_path)
    family, configs = _family_of_folder(folder, v2)
    shapes = {}
    for part in family.parts:
        if part.name in configs:
            weights = weights_of(_build(part, configs[part.name], folder))
            shapes[part.name] = {name: tuple(value.shape) for name, value in weights.items()}
    return Header(family, shapes, _prediction_of_folder(folder))


def load_stable_diffusion(
    name_or_path: str,
    *,
    v2: bool | None = None,
    prediction: Prediction | None = None,
    vae: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    reading: ModelReading | None = None,
) -> Model:
    """A model from a .safetensors or .ckpt file (CompVis layout), a Diffusers folder or a hub id, in `dtype` on `device`.

    `dtype` None: every tensor keeps its own, for saving and not for running; 8-bit ones become float16. `prediction` None: the
    model's own statement, else noise. `vae` replaces the VAE: a file, folder or hub id of a model or of a VAE alone. Raises
    UserError if this is no such model, or contradicts `v2`. `reading`: of that file, for that dtype and device, if it has begun.
    """
    path = Path(name_or_path)
    to: TensorOptions = {"dtype": dtype, "device": device}
    if path.is_file():
        with reading or ModelReading(path, vae is None, dtype, device) as begun:
            model = _from_file(begun, v2, prediction)
    else:
        folder = path if path.is_dir() else download_model(name_or_path)
        model = _from_folder(folder, v2, prediction, vae is None, to)
    model.name, model.path = str(name_or_path), path if path.exists() else None
    if vae is not None:
        model.parts["vae"] = load_vae(vae, **to, part=model.family.vae_part)
        stated, usual = model.latents.scale, model.family.latents.scale
        if stated != usual:
            logger.warning(
                "%s says that its latents are scaled by %g, %s by %g: is it a VAE for it?", vae, stated, model.family.title, usual
            )
    return model


def load_vae(
    name_or_path: str, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu", part: Part = KL_VAE
) -> AutoencoderKL:
    """A VAE from a file of its own (CompVis or Diffusers names), a whole model's file, a Diffusers folder or a hub id.

    `part`: the VAE of the model's family.
    """
    path = Path(name_or_path)
    to: TensorOptions = {"dtype": dtype, "device": device}
    if path.is_file():
        return _vae_from_file(path, part, to)
    if not path.is_dir():
        return for_inference(download_vae(name_or_path, dtype).to(device))
    folder = path if (path / "config.json").is_file() else path / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} holds no VAE: it has neither config.json nor vae/config.json; give a VAE's or model's folder")
    return _part_from_folder(part, folder, _json(folder / "config.json"), to)


def _from_file(reading: ModelReading, v2: bool | None, prediction: Prediction | None) -> Model:
    path, file, family, names = reading.path, reading.file, reading.family, reading.names
    check_v2(str(path), family, v2)
    chosen, zero_snr = _decided(path, prediction_of_file(file), prediction)
    if names.unknown:
        raise UserError(f"{path} is no {family.title} model: its U-Net has the foreign weight {names.unknown[0]}")
    shapes = _shapes_by_part(file, names.to_parts, family)
    for part in reading.parts:
        if not shapes[part.name]:
            cure = "give a VAE with --vae" if part.role == "vae" else "fetch the whole model"
            raise UserError(f"{path} holds no {part.name.replace('_', ' ')}; {cure}")
    configs = _read_configs(str(path), family, shapes, reading.parts, chosen)
    modules = reading.weights.fill({part.name: (part, configs[part.name]) for part in reading.parts})
    tokenizers = [load_tokenizer(padding) for padding in family.text.paddings]
    return Model(family, modules, tokenizers, chosen, str(path), zero_terminal_snr=zero_snr)


def _read_configs(
    source: str, family: Family, shapes: Mapping[str, Shapes], wanted: list[Part], prediction: Prediction
) -> dict[str, Config]:
    try:
        reject_other_inputs(source, family, shapes["unet"]["conv_in.weight"][1])
        return {part.name: part.read_config(shapes[part.name], prediction) for part in wanted}
    except (KeyError, IndexError, ValueError, StopIteration) as error:
        raise UserError(f"{source} is incomplete: its architecture cannot be read ({error}); fetch the whole model") from error


def _vae_from_file(path: Path, part: Part, to: TensorOptions) -> AutoencoderKL:
    with open_tensors(path) as file:
        prefix = VAE_PREFIX if any(name.startswith(VAE_PREFIX) for name in file.shapes) else ""
        names = [name[len(prefix) :] for name in file.shapes if name.startswith(prefix)]
        if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(names):
            raise UserError(f"{path} holds no VAE; give a VAE or a whole model's file")
        in_diffusers_names = any(name.startswith("encoder.down_blocks.") for name in names)
        table = vae_table_for(names)

        def to_parts(name: str, value: Tensor) -> list[tuple[str, str, Tensor]]:
            inside = name[len(prefix) :]
            new = modern_vae_name(inside) if in_diffusers_names else renamed(inside, table)
            if new is None or not name.startswith(prefix) or new.startswith("loss."):
                return []
            return [("vae", new, vae_to_diffusers(new, value))]

        shapes = _shapes_by_part(file, to_parts)["vae"]
        try:
            config = part.read_config(shapes, "epsilon")
        except (KeyError, IndexError) as error:
            raise UserError(f"{path} is incomplete: the VAE's architecture cannot be read ({error}); fetch it again") from error
        with Reading(file, to_parts, {"vae"}, to) as reading:
            return reading.fill({"vae": (part, config)})["vae"]


def _family_of_folder(folder: Path, v2: bool | None) -> tuple[Family, dict[str, Config]]:
    """The family of a Diffusers folder, and the configurations of its parts."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a folder without model_index.json, so no Diffusers model; give the model's file")
    pipeline = str(_json(folder / "model_index.json").get("_class_name", ""))
    files = sorted(folder.glob("*/config.json"))
    configs = {file.parent.name: _json(file) for file in files}
    family = detect_folder(folder, pipeline, configs | {"scheduler": _scheduler_config(folder) or {}})
    reject_other_inputs(str(folder), family, configs.get("unet", {}).get("in_channels", family.latents.channels))
    reject_other_conditions(str(folder), family, configs.get("unet", {}))
    check_v2(str(folder), family, v2)
    return family, configs


def _from_folder(folder: Path, v2: bool | None, prediction: Prediction | None, with_vae: bool, to: TensorOptions) -> Model:
    family, configs = _family_of_folder(folder, v2)
    chosen, zero_snr = _decided(folder, _prediction_of_folder(folder), prediction)
    wanted = [part for part in family.parts if with_vae or part.role != "vae"]
    configs |= {part.name: _json(folder / part.name / "config.json") for part in wanted if part.name not in configs}
    modules = {part.name: _part_from_folder(part, folder / part.name, configs[part.name], to) for part in wanted}
    texts = zip(family.text_parts, family.text.paddings, strict=True)
    tokenizers = [_folder_tokenizer(folder / part.tokenizer, configs[part.name], padding) for part, padding in texts]
    schedule = schedule_of(_scheduler_config(folder) or {})
    return Model(family, modules, tokenizers, chosen, str(folder), zero_terminal_snr=zero_snr, schedule=schedule)


def _part_from_folder(part: Part, folder: Path, config: Config, to: TensorOptions) -> nn.Module:
    def to_parts(name: str, value: Tensor) -> list[tuple[str, str, Tensor]]:
        if part.role == "vae":
            name = modern_vae_name(name)
            value = vae_to_diffusers(name, value)
        name = name.removeprefix(TEXT_MODEL)
        unused = name.endswith("position_ids") or (part.library[1] == "CLIPTextModel" and name.startswith(UNUSED_CLIP_WEIGHTS))
        return [] if unused else [(part.name, name, value)]

    with open_weights(folder, part.weight_files) as file, Reading(file, to_parts, {part.name}, to) as reading:
        return reading.fill({part.name: (part, config)})[part.name]


def open_weights(folder: Path, stems: tuple[str, ...]) -> TensorFile:
    """The weights in a part's folder, one file or several with an index: full precision before fp16, safetensors before .bin."""
    for suffix in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"):
        kind = suffix.rpartition(".")[2]
        middle = suffix.removesuffix(f".{kind}")
        for stem in stems:
            if (folder / (stem + suffix)).is_file():
                return open_tensors(folder / (stem + suffix))
            if (index := folder / f"{stem}.{kind}.index{middle}.json").is_file():
                return ShardedFile(index)
    others = sorted(file.name for stem in stems for file in folder.glob(f"{stem}*") if file.suffix in (".safetensors", ".bin"))
    cure = f"rename {others[0]} to that if it is meant" if others else "fetch the whole model"
    raise UserError(f"{folder} holds no weights: there is no {stems[0]}.safetensors in it; {cure}")


def _folder_tokenizer(folder: Path, text_config: Config, padding: str) -> CLIPTokenizer:
    """CLIP's tokenizer; the folder's own if its text encoder has another vocabulary."""
    if text_config.get("vocab_size", VOCABULARY) == VOCABULARY:
        return load_tokenizer(padding)
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is needed (the vocabulary is not CLIP's) but not readable: {error}") from error


def _prediction_of_folder(folder: Path) -> StatedPrediction:
    config = _scheduler_config(folder)
    return prediction_of_scheduler(config) if config is not None else StatedPrediction()


def _scheduler_config(folder: Path) -> Config | None:
    file = folder / "scheduler" / "scheduler_config.json"
    return _json(file) if file.is_file() else None


def _decided(source: Path, stated: StatedPrediction, asked: Prediction | None) -> tuple[Prediction, bool]:
    """The prediction, and whether the noise schedule ends in pure noise. `asked` wins over what the model states."""
    if asked is not None and stated.prediction not in (None, asked):
        given = "--v_parameterization" if asked == "v" else "v_parameterization = false"
        logger.warning("%s predicts %s; %s is probably wrong", source, stated, given)
    chosen = asked or stated.prediction or "epsilon"
    return chosen, stated.zero_terminal_snr and chosen == "v"


def _without_content(file: TensorFile, name: str) -> Tensor:
    return torch.empty(file.shapes[name], device="meta")


def _read_weight(file: TensorFile, to_parts: ToParts, to: TensorOptions, name: str) -> list[tuple[str, str, Tensor]]:
    """One tensor of the file as weights of parts: (part, name in the module, weight)."""
    is_8_bit = to["dtype"] is None and file.dtypes[name].is_floating_point and file.dtypes[name].itemsize == 1
    placed = to_parts(name, file.read(name, torch.float16 if is_8_bit else to["dtype"], to["device"]))
    # Copy views (the thirds of OpenCLIP's joined attention), so that each weight has memory of its own.
    return [(part, new, t if t.untyped_storage().nbytes() == t.nbytes else t.clone()) for part, new, t in placed]


def _build(part: Part, config: Config, path: Path) -> nn.Module:
    try:
        return part.build(config)
    except Exception as error:  # the libraries raise many kinds for a wrong configuration
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no {part.name.replace('_', ' ')} can be built as its configuration says: {reason}") from error


def _shapes_by_part(file: TensorFile, to_parts: ToParts, family: Family | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of each part by Diffusers names; without a family those of the VAE alone."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {part.name: {} for part in (family.parts if family else [KL_VAE])}
    for name, shape in file.shapes.items():
        for part, new, value in to_parts(name, torch.empty(shape, device="meta")):
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
