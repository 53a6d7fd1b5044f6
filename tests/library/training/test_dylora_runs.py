"""DyLoRA through the trainer: one rank a step, the same for every batch of it, whatever happened before."""

from __future__ import annotations

import json

import pytest

from library.errors import UserError
from networks.dylora import DyLoRAModule, DyLoRANetwork

WORDS = ("--network_module=networks.dylora", "--network_dim=8", "--network_args", "unit=2")


@pytest.fixture
def ranks(monkeypatch) -> list[tuple[str, int]]:
    """What happened in a run: ("draw", rank) and ("factors", rank), which a forward pass asks for once, in their order."""
    events: list[tuple[str, int]] = []
    draw = DyLoRANetwork.on_step_start

    def on_step_start(self, *parts):
        draw(self, *parts)
        events.append(("draw", self.loras[0].active_rank))

    monkeypatch.setattr(DyLoRANetwork, "on_step_start", on_step_start)

    def spy(self):
        if self is spy.first or spy.first is None:
            spy.first = self
            events.append(("factors", self.active_rank))
        return original(self)

    spy.first, original = None, DyLoRAModule.factors
    monkeypatch.setattr(DyLoRAModule, "factors", spy)
    return events


@pytest.mark.option("network_module")
def test_trap_3_3_the_batches_of_a_step_share_one_draw(run, ranks):
    done = run(*WORDS, "--max_train_steps=3", "--gradient_accumulation_steps=2", "--network_train_unet_only")
    assert [kind for kind, _ in ranks] == ["draw", "factors", "factors"] * 3
    assert all(len({rank for _, rank in ranks[i : i + 3]}) == 1 for i in (0, 3, 6))
    words = json.loads(done.metadata()["ss_network_args"])
    assert words == {"unit": "2"} and done.metadata()["ss_network_module"] == "networks.dylora"


def test_trap_4_1_the_ranks_depend_on_the_seed_and_on_nothing_else(run, ranks):
    seen = []
    for words in (("--seed=1",), ("--seed=1", "--learning_rate=1e-4"), ("--seed=2",)):
        ranks.clear()
        run(*WORDS[:-1], "unit=1", "--max_train_steps=4", "--network_train_unet_only", *words)
        seen.append([rank for kind, rank in ranks if kind == "draw"])
    assert seen[0] == seen[1] != seen[2]
    assert len(set(seen[0])) > 1


def test_the_document_s_c3lier_command_trains(run):
    words = ("--network_dim=32", "--network_alpha=16", "--network_args", "conv_dim=32", "conv_alpha=16", "unit=8")
    done = run("--network_module=networks.dylora", *words, "--max_train_steps=1")
    tensors = done.tensors()
    assert {len(t) for k, t in tensors.items() if k.endswith("lora_down.weight")} == {32}
    assert any(t.shape[-1] == 3 for k, t in tensors.items() if k.endswith("lora_down.weight"))


@pytest.mark.option("network_dropout", "network_args")
def test_wrong_words_name_the_option(run):
    with pytest.raises(UserError, match="unit=3 does not divide the rank 8"):
        run(*WORDS[:-1], "unit=3", "--max_train_steps=1")
    with pytest.raises(UserError, match="--network_dropout: a DyLoRA has no such thing"):
        run(*WORDS, "--network_dropout=0.1", "--max_train_steps=1")
