from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from library.errors import UserError
from library.training import setup
from library.training.checks.trial import try_schedule
from library.training.optimization.schedules import create_schedule, waits_for_validation
from library.training.option_types import steps_or_share
from library.training.options import OptimizerOptions

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
    assert rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=steps) == pytest.approx(
        [warmup(s, 10) for s in range(TOTAL)]
    )


@pytest.mark.option("lr_scheduler", "lr_warmup_steps")
def test_linear():
    wanted = [warmup(s, 8) if s < 8 else (TOTAL - s) / (TOTAL - 8) for s in range(TOTAL)]
    assert rates(lr_scheduler="linear", lr_warmup_steps=8) == pytest.approx(wanted)


def test_cosine():
    wanted = [(1 + math.cos(math.pi * s / TOTAL)) / 2 for s in range(TOTAL)]
    assert rates(lr_scheduler="cosine") == pytest.approx(wanted)


@pytest.mark.option("lr_scheduler_num_cycles")
def test_cosine_with_restarts():
    wanted = [(1 + math.cos(math.pi * (4 * s / TOTAL % 1))) / 2 for s in range(TOTAL)]
    assert rates(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=4) == pytest.approx(wanted)


@pytest.mark.option("lr_scheduler_power")
def test_polynomial():
    end = 1e-7 / 2
    wanted = [(1 - end) * (1 - s / TOTAL) ** 2 + end for s in range(TOTAL)]
    assert rates(lr_scheduler="polynomial", lr_scheduler_power=2) == pytest.approx(wanted)


@pytest.mark.option("lr_scheduler_timescale")
def test_inverse_sqrt():
    wanted = [1 / math.sqrt((s + 5) / 5) for s in range(TOTAL)]
    assert rates(lr_scheduler="inverse_sqrt", lr_scheduler_timescale=5) == pytest.approx(wanted)


@pytest.mark.option("lr_decay_steps", "lr_scheduler_min_lr_ratio")
def test_warmup_stable_decay():
    seen = rates(lr_scheduler="warmup_stable_decay", lr_warmup_steps=5, lr_decay_steps="0.5", lr_scheduler_min_lr_ratio=0.1)
    assert seen[5:20] == [1.0] * 15 and seen[0] == pytest.approx(0.1) and 0.1 <= seen[-1] < 0.15


def test_cosine_with_min_lr():
    seen = rates(lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.3)
    assert seen[0] == 1 and min(seen) >= 0.3 and seen[-1] < 0.31


def test_trap_5_10_every_name_works_or_says_what_to_do():
    seen = rates(lr_scheduler="cosine_warmup_with_min_lr", lr_scheduler_min_lr_ratio=0.2, lr_warmup_steps=10)
    assert seen[:10] == pytest.approx([(s + 1) / 10 for s in range(10)]) and seen[-1] == pytest.approx(0.2)
    with pytest.raises(UserError, match="--lr_warmup_steps has no place in --lr_scheduler reduce_lr_on_plateau"):
        rates(lr_scheduler="reduce_lr_on_plateau", lr_warmup_steps=2)
    for name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        with pytest.raises(UserError, match=f"--lr_scheduler {name} needs --lr_scheduler_min_lr_ratio"):
            rates(lr_scheduler=name)
    assert steps_or_share("1e3") == 1000
    with pytest.raises(ValueError, match="a number of steps .100., a share below 1"):
        steps_or_share("1.5")


def test_trap_5_9_the_warm_up_does_not_depend_on_the_number_of_processes(monkeypatch):
    """accelerate ticks a schedule that it prepares once a process; ours is not handed to it."""
    accelerator = Accelerator()
    monkeypatch.setattr("accelerate.scheduler.AcceleratorState", lambda: SimpleNamespace(num_processes=2))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = OptimizerOptions(lr_scheduler="constant_with_warmup", lr_warmup_steps=4)
    plan, network = SimpleNamespace(max_steps=TOTAL), SimpleNamespace(parameters=[])
    chosen = SimpleNamespace(
        optimizer=options, network=SimpleNamespace(scale_weight_norms=None), validation=SimpleNamespace(ema_decay=None)
    )
    ready, machine = SimpleNamespace(options=chosen, plan=plan), SimpleNamespace(accelerator=accelerator)

    def four_rates(prepared, schedule) -> list[float]:
        seen = []
        for _ in range(4):
            prepared.step()
            schedule.step()
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    update = setup.make_update(ready, machine, SimpleNamespace(network=network), optimizer)
    assert four_rates(update.optimizer, update.schedule) == [0.25, 0.5, 0.75, 1]
    theirs = accelerator.prepare(create_schedule(options, optimizer, TOTAL))
    assert four_rates(update.optimizer, theirs) == [0.5, 1, 1, 1], "what it would be otherwise"


def test_arguments_reach_named_schedules_too():
    plain = rates(lr_scheduler="warmup_stable_decay", lr_decay_steps="0.5")
    linear = rates(lr_scheduler="warmup_stable_decay", lr_decay_steps="0.5", lr_scheduler_args=["decay_type=linear"])
    assert linear[30] == pytest.approx(0.5) and plain[25] > linear[25]


def test_piecewise_constant():
    seen = rates(lr_scheduler="piecewise_constant", lr_scheduler_args=["step_rules=1:10,0.1:20,0.01"])
    assert (seen[0], seen[15], seen[30]) == pytest.approx((1, 0.1, 0.01))


@pytest.mark.parametrize("name", [{"lr_scheduler": "reduce_lr_on_plateau"}, {"lr_scheduler_type": "ReduceLROnPlateau"}], ids=str)
def test_reduce_lr_on_plateau_follows_the_validation_loss(name):
    options = OptimizerOptions(learning_rate=1.0, lr_scheduler_args=["patience=1", "factor=0.5"], **name)
    assert waits_for_validation(options) and not waits_for_validation(OptimizerOptions())
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, seen = create_schedule(options, optimizer, TOTAL), []
    for loss in (3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0):
        for _ in range(5):
            optimizer.step()
            schedule.step()
        schedule.validated(loss)
        seen.append(schedule.get_last_lr()[0])
        if len(seen) == 3:  # as after a resume
            state, schedule = schedule.state_dict(), create_schedule(options, optimizer, TOTAL)
            schedule.load_state_dict(state)
    assert seen == [1, 1, 1, 0.5, 0.5, 0.5, 0.25] and optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.option("lr_scheduler_type", "lr_scheduler_args")
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
        ({"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_args": ["patince=2"]}, "patince"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ["pwer=2"]}, "pwer"),
        ({"lr_scheduler": "adafactor:0.1"}, "leave it out"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["stepsize=1"]}, "stepsize"),
        ({"lr_scheduler_type": "StepLRR"}, "StepLR"),
    ],
)
def test_wrong_input(options, part):
    with pytest.raises(UserError, match=part):
        rates(**options)


def test_arguments_in_one_word_are_two():
    options = OptimizerOptions(lr_scheduler_type="CosineAnnealingLR", lr_scheduler_args=["T_max=12 eta_min=0.0001"])
    try_schedule(options, TOTAL)


@pytest.mark.parametrize(
    "options, part",
    [
        (
            {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ["max_lr=1e-3", "total_steps=39"]},
            "--lr_scheduler_type OneCycleLR does not last for the 40 steps of the run: .*change --lr_scheduler_args",
        ),
        (
            {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_max=x"]},
            "T_max=x: CosineAnnealingLR takes a number",
        ),
        (
            {"lr_scheduler_type": "ExponentialLR", "lr_scheduler_args": ["gamma=1e30"]},
            "gives no learning rate at step|does not last",
        ),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=0"]}, "StepLR"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["num_training_steps=9"]}, "give --max_train_steps"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["last_epoch=9"]}, "--resume"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ["lr_end=9"]}, "lr_end"),
    ],
)
def test_a_schedule_that_cannot_go_through_the_run_is_found_before_a_model_loads(options, part):
    with pytest.raises(UserError, match=part):
        try_schedule(OptimizerOptions(learning_rate=2.0, **options), TOTAL)


def test_a_schedule_as_long_as_the_run_passes():
    words = ["max_lr=1e-3", f"total_steps={TOTAL}"]
    try_schedule(OptimizerOptions(lr_scheduler_type="OneCycleLR", lr_scheduler_args=words), TOTAL)
