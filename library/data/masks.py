"""Loss masks: how much each part of an image counts, from a mask image or from the alpha channel. 255 is all, 0 nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.folders import image_suffixes
from library.data.images import BadImage, decode_values, size_of
from library.errors import UserError, counted, listed
from library.files import composed
from library.models.family import LatentSpace

log = logging.getLogger(__name__)


def is_masked(subset: SubsetConfig) -> bool:
    """Whether images of this subset have masks."""
    return subset.alpha_mask or subset.conditioning_data_dir is not None


def check_masks(configs: Sequence[DatasetConfig], masked_loss: bool) -> None:
    """Raises UserError for masks without --masked_loss, and for --masked_loss without masks."""
    subsets = [subset for config in configs for subset in config.subsets]
    with_files = [subset for subset in subsets if subset.conditioning_data_dir]
    for subset in with_files:
        if not masked_loss:
            raise UserError(
                f"conditioning_data_dir = {subset.conditioning_data_dir} holds masks for --masked_loss, which is not given; "
                "ControlNets are not trained here"
            )
        if subset.alpha_mask:
            raise UserError(
                f"the subset {subset.image_dir} has alpha_mask and conditioning_data_dir; take its masks from one of them"
            )
    if masked_loss and not any(is_masked(subset) for subset in subsets):
        raise UserError(
            "--masked_loss: no subset has masks; give --conditioning_data_dir, write conditioning_data_dir into a subset of "
            "the dataset file, or take the alpha channel with --alpha_mask"
        )


def find_masks(subset: SubsetConfig, names: Sequence[str], sizes: np.ndarray) -> list[Path]:
    """The mask of each image: the file of the same name, with the suffix of any image, in `conditioning_data_dir`.

    Of several files of one name the last is taken, which is logged. Raises UserError if an image has no mask, or one of another
    aspect ratio.
    """
    folder = subset.conditioning_data_dir
    assert folder is not None  # called where there is one
    by_folder: dict[Path, dict[str, list[Path]]] = {}
    found, missing, several = [], [], []
    for name in names:
        parent = folder if Path(name).is_absolute() else (folder / name).parent
        if parent not in by_folder:
            by_folder[parent] = _images_by_stem(parent)
        masks = by_folder[parent].get(composed(Path(name).stem), [])
        found += masks[-1:]
        missing += [] if masks else [name]
        several += [f"{name}: {', '.join(mask.name for mask in masks)}"] if len(masks) > 1 else []
    if missing:
        raise UserError(
            f"{folder} holds no mask for {counted(len(missing), 'image')} ({listed(missing)}); add white ones where all counts"
        )
    if several:
        log.warning(
            "%s holds several masks for %s, and the last is used: %s",
            folder,
            counted(len(several), "image"),
            listed(several, separator="; "),
        )
    for mask, (width, height) in zip(found, sizes.tolist(), strict=True):
        _check_aspect_ratio(mask, width, height)
    return found


def _images_by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix.lower() in image_suffixes():
            found.setdefault(composed(file.stem), []).append(file)
    return found


def _check_aspect_ratio(mask: Path, width: int, height: int) -> None:
    try:
        mask_width, mask_height = size_of(mask)
    except BadImage as error:
        raise UserError(f"mask {mask}: {error}") from error
    if abs(mask_width / mask_height / (width / height) - 1) > 0.02:
        raise UserError(
            f"mask {mask} has {mask_width} x {mask_height} pixels and its image {width} x {height}: their shapes differ"
        )


def decode_mask(content: bytes, path: Path) -> np.ndarray:
    """The red channel of a mask's file, (H, W) uint8. Transparent parts are 0. Raises UserError."""
    try:
        return np.ascontiguousarray(decode_values(content)[:, :, 0])
    except BadImage as error:
        raise UserError(f"mask {path}: {error}") from error


def latent_mask(mask: np.ndarray, space: LatentSpace) -> Tensor:
    """The mask averaged over areas to the size of the latents: (H, W) uint8 -> (1, h, w) float32 in 0..1."""
    height, width = mask.shape
    values = torch.tensor(mask, dtype=torch.float32).div_(255)
    return F.interpolate(values[None, None], space.size(width, height), mode="area")[0]
