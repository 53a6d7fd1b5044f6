"""The layouts in which LoRA files name their tensors, brought to one: kohya's `lora_unet_...` and `lora_te_...`.

| layout | a tensor's key |
|---|---|
| kohya | `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` |
| kohya with CompVis' blocks | `lora_unet_middle_block_1_proj_in.lora_down.weight`, `lora_te1_text_model_...` |
| Diffusers, peft | `unet.mid_block.attentions.0.proj_in.lora_A.weight`, `base_model.model.mid_block...` |
| older Diffusers | `unet...attn1.processor.to_q_lora.down.weight`, `text_encoder...q_proj.lora_linear_layer.up.weight` |
| dotted | `unet.mid_block.attentions.0.proj_in.lora_down.weight`, or with `hada_w1_a` and others of LyCORIS |
| ComfyUI | `diffusion_model.middle_block.1.proj_in.lora_up.weight`, `text_encoders.clip_l.transformer.text_model...` |
| OneTrainer's OMI | `unet.middle_block.1.proj_in.lora_up.weight`, `clip_l.text_model...`, `clip_g.text_model...` |

For SD 1.x and 2.x kohya's names have Diffusers' blocks, for SDXL those of its checkpoints, and `lora_te1_`, `lora_te2_`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.formats.families import SD1, SDXL, FileFamily
from library.formats.lora_family import families_of_lora
from library.formats.names import PROJECTION, UNetLayout, unet_table

USUAL_RESNETS = 2  # of each level of a U-Net on the way down
KOALA_DEPTHS = (4, 5)  # the last transformer block of the lowest level, of the 700M and the 1B model; SDXL's is 9
_LOWEST = re.compile(r"down_blocks_2_attentions_0_transformer_blocks_(\d+)_")
_OF_TWO_RESNETS = re.compile(
    r"down_blocks_\d_(?:attentions|resnets)_1_|up_blocks_\d_(?:attentions|resnets)_2_|(?:in|out)put_blocks_[678]_"
)
_OF_ONE_RESNET = "input_blocks_3_1_"  # in the place of SDXL's first downsampler
KOHYA = ("lora_te_", "lora_te1_", "lora_te2_", "lora_unet_")
_IN_UNET = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "conv_norm_out", "time_embedding", "add_embedding")
_IN_COMPVIS_UNET = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out_")
_IN_TEXT = ("encoder_layers_", "final_layer_norm")  # also of a second text encoder
# How paths in files begin, with underscores for dots -> the part they are in. The longest counts. `lora_te1_` is Diffusers' own
# conversion, also for the one text encoder of SD 1.
_PARTS = {
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_unet_": "unet",
    "oft_te_": "text_encoder", "oft_te1_": "text_encoder", "oft_te2_": "text_encoder_2", "oft_unet_": "unet",
    "unet_": "unet", "text_encoder_": "text_encoder", "text_encoder_2_": "text_encoder_2",
    "diffusion_model_": "unet", "model_diffusion_model_": "unet",
    "text_encoders_clip_l_transformer_": "text_encoder", "text_encoders_clip_h_transformer_": "text_encoder",
    "text_encoders_clip_g_transformer_": "text_encoder_2", "clip_l_": "text_encoder", "clip_g_": "text_encoder_2",
}  # fmt: skip
_UNDERSCORED = (*KOHYA, "oft_te_", "oft_te1_", "oft_te2_", "oft_unet_", *(f"lycoris_{start}" for start in _IN_UNET))

# `...to_q.lora_A.weight` (peft, Diffusers), `...to_q.lora.down.weight`, `...q_proj.lora_linear_layer.down.weight`,
# `...attn1.processor.to_q_lora.down.weight` (older Diffusers), `...to_q.lora_down.weight`
FOREIGN_KEY = re.compile(
    r"(?P<path>.+?)(?:\.lora_(?P<side>A|B)(?:\.\w+)?\.weight|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old_side>down|up)\.weight"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.\w+)*"
    r"|\.(?P<tensor>lora_(?:down|up|mid)\.weight|hada_\w+|lokr_\w+|[ab][12]\.weight|oft_blocks|oft_diag|rescale|on_input"
    r"|diff|diff_b|w_norm|b_norm|dora_scale|alpha))"
)
_PEFT_TYPES = ("LORA", "LOHA", "LOKR")  # those whose tensors and formulas are LyCORIS' too
_WITH_RANK = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")  # tensors of as many rows as the rank
SIDES = {"A": "lora_down.weight", "down": "lora_down.weight", "B": "lora_up.weight", "up": "lora_up.weight"}


def lora_name(path: str, family: FileFamily = SD1, resnets: int = USUAL_RESNETS) -> str | None:
    """The LoRA name that a layer has in files for this family, given as any layout gives it; None if no layout does.

    resnets: of each level of the U-Net on the way down, on which the numbers of a checkpoint's blocks depend.

    >>> lora_name("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out")
    'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0'
    """
    part, inside = _part_and_path(path)
    if part not in family.lora_prefixes:
        return path if path.startswith(KOHYA) else None
    if part == "unet":
        is_known = path.startswith(_UNDERSCORED) or inside.startswith((*_IN_UNET, *_IN_COMPVIS_UNET))
        inside = _with_blocks(inside, family.loras_name_checkpoint_paths, resnets)
    else:
        inside = inside.removeprefix("text_model_")
        is_known = path.startswith(_UNDERSCORED) or inside.startswith(_IN_TEXT) or inside == PROJECTION
        inside = inside if inside == PROJECTION else f"text_model_{inside}"
    return f"{family.lora_prefixes[part]}{inside}" if is_known else None


def _part_and_path(path: str) -> tuple[str, str]:
    """The part of the model that a layer is in, and its path there, with underscores for dots."""
    is_dotted = not path.startswith(_UNDERSCORED)
    path = path.removeprefix("base_model.model.").removeprefix("lycoris_").replace(".processor.", ".")
    if is_dotted:
        path = re.sub(r"(attn\d\.to_out)$", r"\1.0", path)
        path = re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", path)
    path = path.replace(".", "_")
    starts = [start for start in _PARTS if path.startswith(start)]
    if starts:
        start = max(starts, key=len)
        return _PARTS[start], path.removeprefix(start)
    return "unet" if path.startswith((*_IN_UNET, *_IN_COMPVIS_UNET)) else "text_encoder", path


def _with_blocks(inside: str, as_checkpoints: bool, resnets: int) -> str:
    """A U-Net layer's path with its block as checkpoints name it (`input_blocks_1_1_...`), or as Diffusers does."""
    table = _block_names(as_checkpoints, resnets)
    end = len(inside)
    while end > 0:
        if inside[:end] in table:
            return table[inside[:end]] + inside[end:]
        end = inside.rfind("_", 0, end)
    return inside


@cache
def _block_names(as_checkpoints: bool, resnets: int) -> dict[str, str]:
    """CompVis' module names and Diffusers' for them, with underscores, of the U-Net that SD 1.x and 2.x share.

    as_checkpoints: the reverse, of SDXL's U-Net.
    """
    if as_checkpoints:
        table = unet_table(UNetLayout(3, resnets, (False, True, True)))
        return {diffusers.replace(".", "_"): compvis.replace(".", "_") for compvis, diffusers in table.items()}
    table = {}
    for attention in ((True, True, True, False), (False,) * 4):  # upsamplers stand at another place where a level has none
        table |= unet_table(UNetLayout(4, 2, attention))
    return {compvis.replace(".", "_"): diffusers.replace(".", "_") for compvis, diffusers in table.items()}


def path_and_tensor(key: str) -> tuple[str, str]:
    """The layer of a key, as the file names it, and its tensor by kohya's name, which is empty if no layout has such a key.

    >>> path_and_tensor("lora_unet_mid_block_attentions_0_proj_in.lora_A.weight")
    ('lora_unet_mid_block_attentions_0_proj_in', 'lora_down.weight')
    """
    if match := FOREIGN_KEY.fullmatch(key):
        side = match["side"] or match["old_side"]
        return match["path"], SIDES[side] if side else match["tensor"] or "dora_scale"
    path, _, tensor = key.partition(".")
    return path, tensor if key.startswith(_UNDERSCORED) else ""


def with_alphas(weights: Mapping[str, Tensor], config: PeftConfig) -> dict[str, Tensor]:
    """The weights with what `config` has written down beside them: the alphas of Diffusers' and peft's layouts.

    Alphas get keys of the file's own layout. One that the file itself holds, under any key, stays. Without any it is the rank.
    """
    if not config.is_given:
        return dict(weights)
    result, alphas = dict(weights), {}
    name_of = _names_for(weights)
    own = {name_of(path) for path, inside in map(path_and_tensor, weights) if inside == "alpha"}
    for key, tensor in weights.items():
        path, inside = path_and_tensor(key)
        alpha = config.alpha(path, len(tensor)) if inside in _WITH_RANK and len(tensor) else None
        if alpha is not None and name_of(path) not in own:
            alphas[f"{path}.alpha"] = torch.tensor(alpha)
        if inside == "lokr_w1" and f"{key.removesuffix(inside)}lokr_w2" in weights:
            result[key] = tensor * config.strength(path)
    return alphas | result


@dataclass(frozen=True)
class Layers:
    """Weights by layer.

    tensors: LoRA name of a layer -> kohya's name of a tensor -> tensor. paths: LoRA name -> the layer as the file names it.
    others: the weights with keys of no known layout.
    """

    tensors: dict[str, dict[str, Tensor]]
    paths: dict[str, str]
    others: dict[str, Tensor]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], name_of: Callable[[str], str | None]) -> Layers:
        """name_of: the LoRA name of a layer, given as the file names it; None if it has none.

        Raises UserError if a layer has a tensor twice.
        """
        found = cls({}, {}, {})
        name_of = cache(name_of)
        for key, tensor in weights.items():
            path, inside = path_and_tensor(key)
            name = name_of(path) if inside else None
            if name is None:
                found.others[key] = tensor
                continue
            tensors = found.tensors.setdefault(name, {})
            if inside in tensors:
                raise UserError(f"it holds {name}.{inside} twice, the second time as {key}")
            tensors[inside] = tensor.view(-1, 1) if inside == "dora_scale" and "lora_magnitude_vector" in key else tensor
            found.paths.setdefault(name, path)
        return found

    def weights(self) -> dict[str, Tensor]:
        """All of them as one dictionary, the others under the keys they had."""
        named = {f"{name}.{inside}": tensor for name, tensors in self.tensors.items() for inside, tensor in tensors.items()}
        return named | self.others


def kohya_layers(weights: Mapping[str, Tensor], family: FileFamily | None = None) -> Layers:
    """The weights by the names that this suite's own files have for layers.

    family: whose names they get; None: SDXL's if the weights are for nothing else.
    Raises UserError if a layer has a tensor twice.
    """
    return Layers.of(weights, _names_for(weights, family))


def _names_for(weights: Mapping[str, Tensor], family: FileFamily | None = None) -> Callable[[str], str | None]:
    """path of a layer -> its LoRA name, as `kohya_layers` gives it to these weights."""
    family = family or naming_family(families_of_lora({key: tuple(tensor.shape) for key, tensor in weights.items()}))
    resnets = resnets_of(weights) or USUAL_RESNETS
    return lambda path: lora_name(path, family, resnets)


def resnets_of(keys: Iterable[str]) -> int | None:
    """ResNets of each level on the way down in the U-Net that has these layers, in any layout; None if they do not show it.

    That of KOALA has one, and its lowest level is half as deep as SDXL's.
    """
    names = [key.replace(".", "_") for key in keys]
    if any(_OF_TWO_RESNETS.search(name) for name in names):
        return 2
    lowest = {int(found[1]) for name in names if (found := _LOWEST.search(name))}
    is_koala = any(_OF_ONE_RESNET in name for name in names) or (lowest and max(lowest) in KOALA_DEPTHS)
    return 1 if is_koala else None


def naming_family(families: Collection[FileFamily]) -> FileFamily:
    """The family whose names a file for one of these gets: SD 1.x and 2.x have the same."""
    return SDXL if list(families) == [SDXL] else SD1


def named_for(weights: Mapping[str, Tensor], layers: Collection[str], resnets: int | None = None) -> dict[str, Tensor]:
    """The weights, in any layout, by the names of a model's layers where these know them.

    resnets: of each level of the model's U-Net; None: as the layers show.
    Weights for another family than that of the layers get its names, so that none of them is known.
    Raises UserError if a layer has a tensor twice.
    """
    if others := other_families(weights, layers):
        return kohya_layers(weights, naming_family(others)).weights()
    family, number = _naming_of(layers), resnets or resnets_of(layers) or USUAL_RESNETS

    def name_of(path: str) -> str | None:
        name = path if path in layers else lora_name(path, family, number)
        return path if path.startswith(KOHYA) and name not in layers else name

    return Layers.of(weights, name_of).weights()


def other_families(weights: Mapping[str, Tensor], layers: Collection[str]) -> tuple[FileFamily, ...]:
    """The families that the weights can be for, if that of a model with these layers is none of them."""
    possible = families_of_lora({key: tuple(tensor.shape) for key, tensor in weights.items()})
    return () if _naming_of(layers) in (naming_family([one]) for one in possible) else possible


def _naming_of(layers: Collection[str]) -> FileFamily:
    """The family by whose rules these layers are named."""
    starts = ("lora_te1_", "lora_te2_", *(f"lora_unet_{block}" for block in ("input_blocks_", "middle_block_", "output_blocks_")))
    return SDXL if any(name.startswith(starts) for name in layers) else SD1


class PeftConfig:
    """What Diffusers and peft keep beside the tensors: in the file's metadata or in `adapter_config.json`.

    Raises UserError, naming the file, if it cannot be read, or is for an adapter that only peft has.
    """

    def __init__(self, file: Path, metadata: Mapping[str, str]):
        self._parts: dict[str, dict[str, Any]] = {}
        beside = file.parent / "adapter_config.json"
        try:
            if "lora_adapter_metadata" in metadata:
                for key, value in json.loads(metadata["lora_adapter_metadata"]).items():
                    part, _, name = key.partition(".")
                    self._parts.setdefault(part, {})[name] = value
            elif file.stem == "adapter_model" and beside.is_file():
                self._parts[""] = dict(json.loads(beside.read_text(encoding="utf-8")))
            for config in self._parts.values():
                for name in ("alpha_pattern", "rank_pattern"):
                    config[name] = {_matcher(pattern): float(value) for pattern, value in (config.get(name) or {}).items()}
        except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
            raise UserError(f"{file}: the description of its alphas is not readable ({error})") from error
        for config in self._parts.values():
            if config.get("peft_type", "LORA") not in _PEFT_TYPES:
                raise UserError(
                    f"{file} is an adapter of peft's kind {config['peft_type']}, which only peft can use; "
                    "merge it into the model with its merge_and_unload and give that model"
                )

    @property
    def is_given(self) -> bool:
        """Whether the file has any such thing."""
        return bool(self._parts)

    def alpha(self, path: str, rank: int) -> float | None:
        """The alpha, as this suite's files have it, of the layer at this path; None if nothing says it."""
        config, inside = self._of(path)
        alpha = _of_pattern(config, "alpha_pattern", inside, config.get("lora_alpha", config.get("alpha")))
        if alpha is None:
            return None
        return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)

    def strength(self, path: str) -> float:
        """alpha / rank of a layer whose tensors do not tell the rank: a LoKr of two whole matrices. 1 if nothing says it."""
        config, inside = self._of(path)
        alpha = self.alpha(path, 1)
        rank = _of_pattern(config, "rank_pattern", inside, config.get("r"))
        return alpha / rank if alpha and rank else 1.0

    def _of(self, path: str) -> tuple[dict[str, Any], str]:
        """The configuration for a layer, and the layer's path in it."""
        path = path.removeprefix("base_model.model.")
        part, _, inside = path.partition(".")
        return (self._parts[part], inside) if part in self._parts else (self._parts.get("", {}), path)


def _of_pattern(config: Mapping[str, Any], name: str, path: str, default: float | None) -> float | None:
    """The value of the first pattern for this path, or the default."""
    return next((value for matcher, value in config.get(name, {}).items() if matcher.fullmatch(path)), default)


def _matcher(pattern: str) -> re.Pattern[str]:
    """peft's rule: a regular expression for the end of the path, from a dot on. The first that matches counts."""
    return re.compile(rf"(?:.*\.)?(?:{pattern})")
