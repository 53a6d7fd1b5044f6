"""Kinds are told by the tensors' names; what does not fit is an error that names the layer and the tensors."""

from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from library.formats.adapters.registry import ADAPTERS, find_adapter

LINEAR = torch.zeros(8, 6)
LOHA = {
    name: torch.ones(8, 2) if name.endswith("a") else torch.ones(2, 6)
    for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
}


def test_every_kind_is_recognised_by_each_of_its_marks():
    for kind in ADAPTERS:
        for mark in kind.marks:
            tensors = {mark: torch.zeros([2] * (kind.dimensions or 2))}
            found = find_adapter("layer", tensors)
            assert found is not None and found.kind is kind


def test_tensors_of_no_kind():
    assert find_adapter("layer", {"alpha": torch.tensor(1.0)}) is None
    assert find_adapter("layer", {"lambda_layer": torch.zeros(4)}) is None
    assert find_adapter("layer", LOHA | {"word": torch.zeros(1)}).unknown == ("word",)


@pytest.mark.parametrize(
    "kind", [kind for kind in ADAPTERS if kind.name not in ("full difference", "norm difference", "OFT", "BOFT")]
)
def test_a_missing_tensor_is_named(kind):
    found = find_adapter("the_layer", {kind.marks[0]: torch.zeros(1, 1)})
    with pytest.raises(UserError, match=r"^the_layer: the tensor \S+ is missing; the file is incomplete$"):
        found.weight_change(LINEAR)


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match=r"^layer: .*hada_w2_b 2 x 6.* do not fit .* weight of 6 x 8; is the file"):
        find_adapter("layer", LOHA).weight_change(LINEAR.T)
    with pytest.raises(UserError, match=r"^layer: .*hada_w2_b 3 x 6.* do not fit"):
        find_adapter("layer", LOHA | {"hada_w2_b": torch.ones(3, 6)}).weight_change(LINEAR)
    with pytest.raises(UserError, match="dora_scale 5 x 1.* do not fit"):
        find_adapter("layer", LOHA | {"dora_scale": torch.ones(5, 1)}).weight_change(LINEAR)
    with pytest.raises(UserError, match="oft_blocks 2 x 3 x 3 do not fit"):
        find_adapter("layer", {"oft_blocks": torch.ones(2, 3, 3)}).weight_change(LINEAR)
    with pytest.raises(UserError, match="oft_blocks 3 x 2 x 4 x 4 do not fit"):
        find_adapter("layer", {"oft_blocks": torch.ones(3, 2, 4, 4)}).weight_change(LINEAR)
    with pytest.raises(UserError, match="diff_b 5 do not fit"):
        find_adapter("layer", {"diff_b": torch.ones(5)}).bias_change(torch.zeros(8))


def test_numbers_that_are_none():
    with pytest.raises(UserError, match=r"^layer: alpha is no single number but has the shape \(2,\)"):
        find_adapter("layer", LOHA | {"alpha": torch.ones(2)}).weight_change(LINEAR)
    with pytest.raises(UserError, match=r"^layer: alpha is nan"):
        find_adapter("layer", LOHA | {"alpha": torch.tensor(float("nan"))}).weight_change(LINEAR)
    with pytest.raises(UserError, match=r"^layer: the tensor hada_w1_a is int8, not of floating point"):
        find_adapter("layer", LOHA | {"hada_w1_a": torch.ones(8, 2, dtype=torch.int8)}).weight_change(LINEAR)
    assert not find_adapter("layer", LOHA | {"hada_w1_a": torch.full((8, 2), float("inf"))}).is_finite()


def test_rank_0_changes_nothing():
    tensors = {"lora_up.weight": torch.zeros(8, 0), "lora_down.weight": torch.zeros(0, 6), "alpha": torch.tensor(4.0)}
    assert torch.equal(find_adapter("layer", tensors).weight_change(LINEAR), LINEAR)
