from __future__ import annotations

import math

import pytest
import torch

from library.errors import UserError
from library.training.options import OptimizerOptions
from library.training.schedules import create_schedule

TOTAL = 40


def rates(**options) -> list[float]:
    """The learning rate at each of 40 steps, as a share of the full one."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = create_schedule(OptimizerOptions(learning_rate=2.0, **options), optimizer, TOTAL)
    seen = []
    for _ in range(TOTAL):
        seen.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        schedule.step()
    return seen


def warmup(step: int, steps: int) -> float:
    return min(1.0, step / steps) if steps else 1.0


def test_constant():
    assert rates() == [1.0] * TOTAL


@pytest.mark.parametrize("steps", [10, "0.25", "25%"])
def test_constant_with_warmup_in_steps_or_as_a_share(steps):
    assert rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=steps) == pytest.approx([warmup(s, 10) for s in range(TOTAL)])


def test_linear():
    wanted = [warmup(s, 8) if s < 8 else (TOTAL - s) / (TOTAL - 8) for s in range(TOTAL)]
    assert rates(lr_scheduler="linear", lr_warmup_steps=8) == pytest.approx(wanted)


def test_cosine():
    wanted = [(1 + math.cos(math.pi * s / TOTAL)) / 2 for s in range(TOTAL)]
    assert rates(lr_scheduler="cosine") == pytest.approx(wanted)


def test_cosine_with_restarts():
    wanted = [(1 + math.cos(math.pi * (4 * s / TOTAL % 1))) / 2 for s in range(TOTAL)]
    assert rates(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=4) == pytest.approx(wanted)


def test_polynomial():
    end = 1e-7 / 2
    wanted = [(1 - end) * (1 - s / TOTAL) ** 2 + end for s in range(TOTAL)]
    assert rates(lr_scheduler="polynomial", lr_scheduler_power=2) == pytest.approx(wanted)


def test_inverse_sqrt():
    wanted = [1 / math.sqrt((s + 5) / 5) for s in range(TOTAL)]
    assert rates(lr_scheduler="inverse_sqrt", lr_scheduler_timescale=5) == pytest.approx(wanted)


def test_warmup_stable_decay():
    seen = rates(lr_scheduler="warmup_stable_decay", lr_warmup_steps=5, lr_decay_steps="0.5", lr_scheduler_min_lr_ratio=0.1)
    assert seen[5:20] == [1.0] * 15 and seen[0] == pytest.approx(0.1) and 0.1 <= seen[-1] < 0.15


def test_cosine_with_min_lr():
    seen = rates(lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.3)
    assert seen[0] == 1 and min(seen) >= 0.3 and seen[-1] < 0.31


def test_piecewise_constant():
    seen = rates(lr_scheduler="piecewise_constant", lr_scheduler_args=["step_rules=1:10,0.1:20,0.01"])
    assert (seen[0], seen[15], seen[30]) == pytest.approx((1, 0.1, 0.01))


def test_any_class():
    seen = rates(lr_scheduler_type="StepLR", lr_scheduler_args=["step_size=10", "gamma=0.5"])
    assert (seen[0], seen[10], seen[20]) == (1, 0.5, 0.25)


@pytest.mark.parametrize(
    "options, part",
    [
        ({"lr_scheduler": "cosin"}, "cosine"),
        ({"lr_warmup_steps": 5}, "constant_with_warmup"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 41}, "41"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules=foo"]}, "piecewise_constant"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "validation"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["stepsize=1"]}, "stepsize"),
        ({"lr_scheduler_type": "StepLRR"}, "StepLR"),
    ],
)
def test_wrong_input(options, part):
    with pytest.raises(UserError, match=part):
        rates(**options)
