from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from library.training.optimizers import create_optimizer, parse_key_values
from library.training.options import OptimizerOptions

CPU = torch.device("cpu")


def groups():
    return [{"params": [torch.nn.Parameter(torch.ones(64, 64))], "lr": 0.5}]


def test_adamw_is_the_default_and_groups_keep_their_rate():
    optimizer, name = create_optimizer(OptimizerOptions(learning_rate=0.1), groups(), CPU)
    assert isinstance(optimizer, torch.optim.AdamW) and name == "torch.optim.adamw.AdamW"
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_arguments_reach_the_optimizer_and_its_name():
    options = OptimizerOptions(optimizer_type="adamw", optimizer_args=["weight_decay=0.2", "betas=(0.8, 0.9)"])
    optimizer, name = create_optimizer(options, groups(), CPU)
    assert optimizer.param_groups[0]["weight_decay"] == 0.2 and optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert name.endswith("(weight_decay=0.2,betas=(0.8, 0.9))")


def test_adamw8bit_steps_on_a_cpu():
    optimizer, name = create_optimizer(OptimizerOptions(use_8bit_adam=True), groups(), CPU)
    parameter = optimizer.param_groups[0]["params"][0]
    before = parameter.detach().clone()
    parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    assert name == "bitsandbytes.optim.adamw.AdamW8bit"
    assert torch.isfinite(parameter).all() and (parameter != before).all()


def test_sgd_nesterov_has_momentum_unless_given():
    optimizer, _ = create_optimizer(OptimizerOptions(optimizer_type="SGDNesterov"), groups(), CPU)
    assert optimizer.param_groups[0]["momentum"] == 0.9 and optimizer.param_groups[0]["nesterov"]
    optimizer, _ = create_optimizer(OptimizerOptions(optimizer_type="SGDNesterov", optimizer_args=["momentum=0.5"]), groups(), CPU)
    assert optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize("name", ["torch.optim.Adagrad", "Adagrad"])
def test_any_class_by_path_and_torch_classes_by_name(name):
    optimizer, _ = create_optimizer(OptimizerOptions(optimizer_type=name), groups(), CPU)
    assert isinstance(optimizer, torch.optim.Adagrad)


@pytest.mark.parametrize(
    "options, part",
    [
        ({"optimizer_type": "AdmW"}, "AdamW"),
        ({"optimizer_type": "no_such_package.Thing"}, "pip install no_such_package"),
        ({"optimizer_type": "torch.optim.AdamWW"}, "torch.optim.AdamW"),
        ({"optimizer_type": "PagedAdamW8bit"}, "AdamW8bit"),
        ({"optimizer_type": "torch.optim.SparseAdam"}, "sparse"),
        ({"optimizer_type": "Prodigy"}, "not built yet"),
        ({"optimizer_args": ["weight_decy=1"]}, "weight_decy"),
        ({"optimizer_args": ["weight_decay"]}, "key=value"),
    ],
)
def test_wrong_input(options, part):
    with pytest.raises(UserError, match=part):
        create_optimizer(OptimizerOptions(**options), groups(), CPU)


def test_a_missing_package_is_reported_with_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lion_pytorch", None)
    with pytest.raises(UserError, match="pip install lion-pytorch"):
        create_optimizer(OptimizerOptions(use_lion_optimizer=True), groups(), CPU)


def test_literals():
    assert parse_key_values(["a=1", "b=True", "c=text=2", "d=1e-3"], "o") == {"a": 1, "b": True, "c": "text=2", "d": 1e-3}
