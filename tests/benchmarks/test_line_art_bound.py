"""benchmarks/line_art_bound.py: the network learns from pairs, and the pairs stay pairs."""

from __future__ import annotations

import torch

from assets.make.perceptual import Perceptual
from benchmarks import line_art_bound


def test_pairs_are_moved_alike():
    torch.manual_seed(0)
    image = torch.rand(3, 16, 16)
    for _ in range(8):
        seen, drawn = line_art_bound.shifted((image, -image))
        inside = (seen < 1) & (drawn < 1)  # what comes in is white in both
        assert torch.equal(seen[inside], -drawn[inside]) and inside.float().mean() > 0.2


def test_the_network_learns_what_the_pairs_show(vgg_weights):
    torch.manual_seed(0)
    images = torch.rand(12, 3, 16, 16) * 2 - 1
    drawings = -images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    new, taught = (line_art_bound.learn(images[:8], drawings[:8], line_art_bound.pixel_error, steps) for steps in (1, 40))
    judge = Perceptual(vgg_weights)
    with torch.no_grad():
        before, after = (line_art_bound.figures_of(network(images[8:]), drawings[8:], judge) for network in (new, taught))
    assert after["pixel error"] < 0.7 * before["pixel error"]
    assert line_art_bound.figures_of(drawings, drawings, judge) == {"pixel error": 0.0, "LPIPS": 0.0}
