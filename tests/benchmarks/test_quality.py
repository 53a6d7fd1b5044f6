"""The measures of benchmarks/quality.py, on numbers whose answer is known."""

from __future__ import annotations

import pytest
import torch

from assets.make.names import NAMES
from benchmarks import quality
from library.testing import small_stable_diffusion


def test_hits_count_rows_that_are_nearest_to_their_own():
    assert quality.hits(torch.tensor([[0.1, 0.5, 0.5], [0.5, 0.4, 0.2], [0.3, 0.3, 0.0]])) == pytest.approx(2 / 3)


def test_saturation_is_none_for_grey_and_full_for_red():
    red = torch.full((1, 3, 4, 4), -1.0)
    red[:, 0] = 1
    assert quality.saturation(red) == 1
    assert quality.saturation(torch.full((1, 3, 4, 4), 0.3)) == 0


def test_lora_is_judged_on_fifty_names_that_the_base_knows_and_training_does_not_see():
    seen = {path.stem.replace("-", " ") for path in quality.EXAMPLE.glob("*.webp")}
    known = {name for names in NAMES.values() for name in names}
    unseen = quality.unseen_names()
    assert len(seen) == 150 and len(set(unseen)) == 50
    assert set(unseen) <= known - seen
    assert len(set(quality.forty_names())) == 40


def test_table_has_mean_and_spread():
    assert "| a | 2 | 1 | 3 | 3 |" in quality.as_table({"a": [1.0, 2.0, 3.0]})


def test_images_are_drawn_as_tensors(monkeypatch):
    monkeypatch.setitem(quality.demo.DRAWING, "steps", 1)
    model = small_stable_diffusion(unet_channels=(32, 32, 32, 32), vae_channels=(32, 32, 32, 32), text_layers=1)
    drawn = quality.draw(model, ["a key", "a pear"], seed=1)
    assert drawn.shape == (2, 3, 64, 64) and -1 <= drawn.min() < drawn.max() <= 1
    assert not torch.equal(drawn[0], drawn[1])
