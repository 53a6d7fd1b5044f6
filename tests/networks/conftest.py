"""Tiny models for the network tests."""

from __future__ import annotations

import pytest
from tiny_models import TinyModel, make_tiny_model


@pytest.fixture
def model() -> TinyModel:
    return make_tiny_model()


@pytest.fixture
def linear_model() -> TinyModel:
    """As `model`, with the projections as Linear, like SD 2 in Diffusers."""
    return make_tiny_model(linear_projection=True)
