from __future__ import annotations

import pytest
from reference_pipelines import SMALL

from library.generation.pipeline.pipeline import Pipeline
from library.generation.pipeline.settings import GenerateSettings
from library.models.family import Model
from library.testing import small_stable_diffusion


@pytest.fixture(scope="session")
def model():
    """A small SD 1. Tests must not change it, or change it back."""
    return small_stable_diffusion(seed=0, **SMALL)


@pytest.fixture(scope="session")
def v_model():
    return small_stable_diffusion(seed=1, family="sd2", v_parameterization=True, **SMALL)


@pytest.fixture
def latents_of(monkeypatch):
    """Run `generate` and return the latents that reach the VAE, one an image, in order."""

    def run(model, specs, **options):
        seen = []

        def decode(model, latents):
            seen.extend(latents.clone())
            return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

        with monkeypatch.context() as patched:
            patched.setattr(Model, "decode", decode)
            list(Pipeline(model, GenerateSettings(**options)).generate(specs))
        return seen

    return run
