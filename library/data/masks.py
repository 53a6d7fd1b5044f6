"""Loss masks: which parts of an image count, from an image of their own or from the alpha channel. 255 counts fully, 0 not."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from library.data.config_keys import DatasetConfig, SubsetConfig
from library.data.folders import image_suffixes
from library.data.images import BadImage, decode_values, size_of
from library.errors import UserError
from library.models.family import LatentSpace

NAMED_AT_MOST = 5


def is_masked(subset: SubsetConfig) -> bool:
    """Whether images of this subset have masks."""
    return subset.alpha_mask or subset.conditioning_data_dir is not None


def check_masks(configs: Sequence[DatasetConfig], masked_loss: bool) -> None:
    """Refuse masks without --masked_loss, and that without masks."""
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
    """The mask of each image: the file of the same name, with any suffix of images, in `conditioning_data_dir`.

    Raises UserError if some have none, or one of another shape than the image's.
    """
    folder = subset.conditioning_data_dir
    assert folder is not None  # called where there is one
    there: dict[Path, dict[str, Path]] = {}
    found, missing = [], []
    for name in names:
        parent = folder if Path(name).is_absolute() else (folder / name).parent
        if parent not in there:
            files = sorted(parent.iterdir()) if parent.is_dir() else []
            there[parent] = {_look(file): file for file in files if file.suffix.lower() in image_suffixes()}
        mask = there[parent].get(_look(Path(name)))
        if mask is None:
            missing.append(name)
        else:
            found.append(mask)
    if missing:
        named = ", ".join(missing[:NAMED_AT_MOST]) + (", ..." if len(missing) > NAMED_AT_MOST else "")
        raise UserError(
            f"{len(missing)} images have no mask of their name in {folder} ({named}); add white ones where all counts"
        )
    for mask, (width, height) in zip(found, sizes.tolist(), strict=True):
        _check_shape(mask, width, height)
    return found


def _look(path: Path) -> str:
    """The stem in composed form: image and mask may come from two systems, which write accents in two ways."""
    return unicodedata.normalize("NFC", path.stem)


def _check_shape(mask: Path, width: int, height: int) -> None:
    try:
        mask_width, mask_height = size_of(mask)
    except BadImage as error:
        raise UserError(f"mask {mask}: {error}") from error
    if abs(mask_width / mask_height / (width / height) - 1) > 0.02:
        raise UserError(
            f"mask {mask} has {mask_width} x {mask_height} pixels and its image {width} x {height}: their shapes differ"
        )


def decode_mask(content: bytes, path: Path) -> np.ndarray:
    """The red channel of a mask's file, (H, W) uint8; what was erased in it does not count."""
    try:
        return np.ascontiguousarray(decode_values(content)[:, :, 0])
    except BadImage as error:
        raise UserError(f"mask {path}: {error}") from error


def latent_mask(mask: np.ndarray, space: LatentSpace) -> Tensor:
    """The mask at the size of latents by averaging areas: (H, W) uint8 -> (1, h, w) float32 in 0..1."""
    height, width = mask.shape
    values = torch.tensor(mask, dtype=torch.float32).div_(255)
    return F.interpolate(values[None, None], space.size(width, height), mode="area")[0]
