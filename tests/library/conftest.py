from __future__ import annotations

import pytest

from library.models.saving import save_stable_diffusion
from library.testing import small_stable_diffusion


@pytest.fixture(scope="session")
def small_models():
    """The small SD 1 and SD 2, by whether they need `--v2`. Tests must not change them."""
    return {False: small_stable_diffusion(seed=1), True: small_stable_diffusion(seed=1, family="sd2")}


@pytest.fixture(scope="session")
def saved_models(small_models, tmp_path_factory):
    """The small models on disk, by (v2, kind): a CompVis file and a Diffusers folder each. Tests must not change them."""
    folder = tmp_path_factory.mktemp("saved")
    paths = {}
    for v2, model in small_models.items():
        for kind in ("model.safetensors", "model.ckpt", "folder"):
            paths[v2, kind] = folder / f"v{1 + v2}" / kind
            save_stable_diffusion(model, paths[v2, kind])
    return paths
