"""The perceptual distance, against what its papers write."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
import torch.nn.functional as F

from assets.make.perceptual import ArraysOnly, Perceptual, frechet_distance, pairwise


def test_frechet_distance_of_normal_sets():
    a = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3.0, 0.0, 0.0])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + shift) == pytest.approx(9, rel=1e-6)
    # Deviations 1 and 3 in each of 3 dimensions: 3 (3 - 1)^2, apart from the shifted mean.
    assert frechet_distance(a, 3 * a) == pytest.approx(3 * 4, rel=0.1)


def test_distances_of_vectors_are_lpips(vgg_weights):
    """LPIPS as the paper writes it: per level, unit features' squared difference, weighted by channel, averaged over places."""
    judge = Perceptual(vgg_weights)
    a, b = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (1, 2))
    expected = torch.zeros(2)
    for one, other, head in zip(judge.levels(a), judge.levels(b), judge.heads, strict=True):
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


def test_the_distance_of_pairs_is_that_of_their_vectors_and_can_be_learnt_from(vgg_weights):
    judge = Perceptual(vgg_weights)
    a, b = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (1, 2))
    a.requires_grad_(True)
    b.requires_grad_(True)
    distance = judge.distance(a, b)
    assert float(distance) == pytest.approx(float(pairwise(judge.vectors(a), judge.vectors(b)).diagonal().mean()), rel=1e-3)
    distance.backward()
    assert b.grad is None
    nearer = (a - a.grad / a.grad.norm()).detach()
    assert float(judge.distance(nearer, b)) < float(distance)
