"""--gradient_checkpointing_budget: as few parts are computed twice as the memory needs, and nothing else changes."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.testing import full_size_header
from library.training.checks.estimates import WORKSPACE, estimated_bytes
from library.training.memory.gradient_checkpointing import (
    GIB,
    choose,
    count_kept,
    keep_to_budget,
    units,
    use_gradient_checkpointing,
)
from library.training.options import parse_options
from networks.lora import create_network
from tests.library.training.small_runs import image_folder, tensors_of, train, two_blocks, use_two_blocks, words_of_a_run

NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--network_module=networks.lora"]


def options(*words: str):
    return parse_options([*NEEDED, "--gradient_checkpointing", *words])


def dataset_of(*buckets: tuple[int, tuple[int, int]]):
    """Datasets of one bucket each, by batch size and size of the images."""
    configs = [SimpleNamespace(batch_size=batch) for batch, _ in buckets]
    sizes = [SimpleNamespace(dataset=number, size=size) for number, (_, size) in enumerate(buckets)]
    return SimpleNamespace(table=SimpleNamespace(configs=configs, buckets=sizes))


@pytest.fixture(scope="module")
def parts():
    """Model, network, and what is needed to count: a batch of two images of 64 px."""
    model = replace(two_blocks(), parts={**two_blocks().parts, "unet": copy.deepcopy(two_blocks().denoiser).train()})
    network = create_network(1.0, 2, 2, None, None, model.denoiser, conv_dim=2)
    network.apply_to(None, model.denoiser, False, True)
    for lora in network.loras:
        nn.init.normal_(lora.lora_up.weight, std=0.1)
    model.denoiser.enable_gradient_checkpointing()
    return model, SimpleNamespace(module=network, trains_text_encoder=False), dataset_of((1, (64, 64)), (2, (64, 64)))


def step(model, network) -> tuple[int, list[torch.Tensor]]:
    """Bytes that one step of two images keeps, and the gradients."""
    torch.manual_seed(3)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.randn(2, 77, 32)
    weights = [tensor for module in (model.denoiser, network) for tensor in (*module.parameters(), *module.buffers())]
    kept = {weight.untyped_storage().data_ptr(): 0 for weight in weights}
    holds = []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            holds.append(tensor)
        return tensor

    network.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model.denoiser(x, t, encoder_hidden_states=context).sample
    y.square().mean().backward()
    return sum(kept.values()), [p.grad.clone() for p in network.parameters()]


def test_what_is_counted_is_what_is_kept_and_gradients_are_the_plain_ones(parts):
    model, network, dataset = parts
    plain, checkpointed = count_kept(model, network, dataset, 77, contextlib.nullcontext)
    choices = [set(), set(range(0, len(units(model.denoiser)), 2)), set(range(len(units(model.denoiser))))]
    gradients = []
    for chosen in choices:
        for index, unit in enumerate(units(model.denoiser)):
            unit.gradient_checkpointing = index in chosen
        kept, found = step(model, network.module)
        counted = sum(checkpointed[i] if i in chosen else plain[i] for i in range(len(plain)))
        assert kept == pytest.approx(counted, rel=0.02), chosen
        gradients.append(found)
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))
    assert sum(checkpointed) < 0.5 * sum(plain) and network.module.training


def test_the_largest_savings_come_first_and_no_more_than_needed():
    plain, checkpointed = [100, 400, 50, 200, 30], [10, 20, 50, 20, 30]
    assert choose(plain, checkpointed, 1000) == (set(), 780)
    assert choose(plain, checkpointed, 779) == ({1}, 400)
    assert choose(plain, checkpointed, 399) == ({1, 3}, 220)
    assert choose(plain, checkpointed, 0) == ({0, 1, 3}, 130), "what saves nothing is left alone"


def test_a_budget_between_none_and_all_is_met(parts, capsys):
    model, network, dataset = parts
    plain, checkpointed = (sum(kept) for kept in count_kept(model, network, dataset, 77, contextlib.nullcontext))
    fixed, found = 3 * GIB, []
    for activations in (plain + 1, (plain + checkpointed) // 2, 1):
        budget = (fixed + activations * WORKSPACE) / GIB
        use_gradient_checkpointing(model, network)
        keep_to_budget(budget, fixed, model, lambda: count_kept(model, network, dataset, 77, contextlib.nullcontext))
        found.append(sum(unit.gradient_checkpointing for unit in units(model.denoiser)))
    lines = capsys.readouterr().out.splitlines()
    parts_there = len(units(model.denoiser))
    assert found[0] == 0 < found[1] < found[2] <= parts_there
    assert [f"{count} of {parts_there} parts" in line for count, line in zip(found, lines, strict=True)] == [True] * 3
    assert "cannot be less" in lines[2] and "cannot be less" not in lines[1]


def test_a_network_that_cannot_be_counted_is_reported_and_all_is_checkpointed(parts, capsys):
    def fails():
        raise RuntimeError("no data")

    model, network, _ = parts
    use_gradient_checkpointing(model, network)
    keep_to_budget(9, 3 * GIB, model, fails)
    assert (
        all(unit.gradient_checkpointing for unit in units(model.denoiser))
        and "no data); all is checkpointed" in capsys.readouterr().out
    )


@pytest.mark.option("gradient_checkpointing", "gradient_checkpointing_budget")
def test_a_run_with_a_budget_checkpoints_what_it_must_and_learns_the_same(tmp_path, monkeypatch, capsys):
    use_two_blocks(monkeypatch.setattr)
    images = image_folder(tmp_path / "images", 2)
    more = ["--max_train_steps=2", "--gradient_checkpointing"]
    switched = []
    for budget in ([], ["--gradient_checkpointing_budget=99"]):
        made = train(words_of_a_run(images, tmp_path / f"out{len(budget)}", *more, *budget))
        switched.append({unit.gradient_checkpointing for unit in units(made.model.denoiser)})
    assert switched == [{True}, {False}]
    assert "0 of" in capsys.readouterr().out
    ends = [tensors_of(tmp_path / f"out{n}" / "mine.safetensors") for n in (0, 1)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_estimate_of_a_budget_lies_between_none_and_all():
    half, batch = ["--mixed_precision=fp16"], (4, (512, 512))
    plain = estimated_bytes(parse_options([*NEEDED, *half]), full_size_header(), *batch)
    least = estimated_bytes(options(*half), full_size_header(), *batch)
    estimates = [
        estimated_bytes(options(*half, f"--gradient_checkpointing_budget={budget}"), full_size_header(), *batch)
        for budget in (1, 5, 99)
    ]
    assert estimates == [least, 5 * 2**30, plain] and least < 5 * 2**30 < plain


@pytest.mark.parametrize("word, part", [
    ("--gradient_checkpointing_budget=0", "--gradient_checkpointing_budget: expected greater than 0, got '0'"),
    ("--gradient_checkpointing_budget=half", "--gradient_checkpointing_budget: expected a valid number, got 'half'"),
    ("--gradient_checkpointing_budge=4", "did you mean '--gradient_checkpointing_budget'"),
])  # fmt: skip
def test_wrong_budgets(word, part):
    with pytest.raises(UserError, match=part):
        options(word)
