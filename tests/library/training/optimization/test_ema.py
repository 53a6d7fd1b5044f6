"""The average of the weights, and its use without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.training.optimization.ema import ExponentialAverage, eval_weights, make_average
from library.training.options import ValidationOptions


def test_the_formula():
    weight = nn.Parameter(torch.zeros(3))
    average, expected = ExponentialAverage([weight], 0.9), torch.zeros(3, dtype=torch.float64)
    for n in range(1, 120):
        with torch.no_grad():
            weight.copy_(torch.full((3,), float(n)))
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    torch.testing.assert_close(average.weights[0].double(), expected, rtol=1e-5, atol=0)
    assert average.updates == 119 and average.weights[0].dtype == torch.float32


def test_half_precision_weights_are_averaged_in_float32():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    average = ExponentialAverage([weight], 0.999)
    for _ in range(100):
        average.update()
    with torch.no_grad():
        weight.add_(1 / 128)
    average.update()
    assert average.weights[0].dtype == torch.float32 and 1 < average.weights[0][0] < 1 + 1 / 128


@pytest.mark.option("ema_decay")
@pytest.mark.parametrize("decay", [None, 0.5])
def test_training_finds_its_weights_as_they_were_to_the_bit(decay):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.rand(1000))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    average = make_average(ValidationOptions(ema_decay=decay), [weight], optimizer)
    with torch.no_grad():
        weight.mul_(1.7)
    before = weight.detach().clone()
    with pytest.raises(ZeroDivisionError), eval_weights(optimizer, average):
        assert torch.equal(weight.detach(), average.weights[0] if decay else before)
        assert torch.equal(weight.detach(), before) == (decay is None)
        raise ZeroDivisionError
    assert torch.equal(weight.detach(), before)


def test_an_optimizer_that_averages_by_itself_is_refused():
    torch.manual_seed(0)
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree([nn.Parameter(torch.rand(2))])
    with pytest.raises(UserError, match="--ema_decay: a schedule-free optimizer averages"):
        make_average(ValidationOptions(ema_decay=0.9), [], optimizer)
