"""benchmarks/train_step.py with the smallest model: every measurement gives its numbers, and the results file keeps its rows."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from benchmarks import train_step
from benchmarks.train_step import CASES, Case
from library.training.memory.frozen import FrozenConv2d, FrozenLinear
from library.training.options import parse_options
from tests.library.training.small_runs import two_blocks, use_two_blocks

CASE = Case(64, 2, "no", "unet")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the script makes, for the model of two blocks."""
    use_two_blocks(monkeypatch.setattr)
    monkeypatch.setattr(train_step, "IMAGES", 4)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, many runs
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")  # never read
    (tmp_path / "unet.json").write_text(json.dumps(dict(two_blocks().denoiser.config)), encoding="utf-8")
    train_step.make_images(tmp_path / "64px", 64)
    return tmp_path


def test_ours_and_floor_are_the_same_weights_by_turns(folder, monkeypatch, by_onednn):
    seen = []
    bare = train_step.bare
    monkeypatch.setattr(train_step, "bare", lambda unet: seen.append((unet, bare(unet))) or seen[-1][1])
    found = train_step.measure_time(CASE, folder, 2)
    assert found["ratio"] == found["ours"] / found["floor"] > 0 and found["cpu_ratio"] > 0
    ((ours, floor),) = seen
    assert all(a is b for a, b in zip(ours.parameters(), floor.parameters(), strict=True))
    assert any(module._forward_hooks for module in ours.modules())
    assert not any(module._forward_hooks for module in floor.modules())
    kinds = [{type(module) for module in unet.modules()} & {FrozenConv2d, FrozenLinear} for unet in (ours, floor)]
    assert kinds == [{FrozenConv2d, *([FrozenLinear] if by_onednn else [])}, set()]


def test_text_encoder_in_the_floor_reads_and_gives_gradients_without_touching_the_run(folder, monkeypatch):
    encoders, step = [], train_step.floor_step

    def watched(unet, case, text_encoders=()):
        encoders.extend(text_encoders)
        return step(unet, case, text_encoders)

    monkeypatch.setattr(train_step, "floor_step", watched)
    found = train_step.measure_time(Case(64, 2, "no", "text_floor"), folder, 1)
    (encoder,) = encoders
    assert found["ratio"] > 0
    assert [name for name, weight in encoder.named_parameters() if weight.requires_grad] == [
        name for name, _ in encoder.named_parameters() if name.endswith("position_embedding.weight")
    ]
    assert not any(module._forward_hooks for module in encoder.modules())


@pytest.mark.parametrize("what, parts", [
    ("ours", {"peak"}), ("floor", {"peak"}), ("aside", {"caching", "file", "log", "preview"}),
])  # fmt: skip
def test_measurement_gives_its_numbers(folder, what, parts):
    found = train_step.MEASURES[what](CASE, folder, 1)
    assert found.keys() == parts and all(number > 0 for number in found.values())


def test_a_launch_is_timed_by_what_it_prints(tmp_path):
    train_step.prepare(tmp_path, [64], small=True)
    found = train_step.measure_launch(CASE, tmp_path)
    assert [*found] == [*train_step.MARKS] and [*found.values()] == sorted(found.values())
    with pytest.raises(SystemExit, match="no_such_folder"):
        train_step.measure_launch(CASE, tmp_path / "no_such_folder")


def test_words_of_every_case_are_options(tmp_path):
    for kind in CASES:
        options = parse_options(Case(256, 4, "no", kind).words(tmp_path, 7))
        assert (options.training.max_train_steps, options.data.train_batch_size) == (7, 4)
        assert options.training.gradient_checkpointing == ("checkpointing" in kind)
        assert options.network.network_train_unet_only == ("text" not in kind)


def test_rows_stay_until_they_are_measured_again(tmp_path):
    path = tmp_path / "results.md"
    for rows in (
        [("steps", "| a | 1 |"), ("aside", "| launch at 64 px | 3 |")],
        [("steps", "| b | 5 |"), ("steps", "| a | 2 |")],
    ):
        tables = train_step.results(path, "a machine")
        for table, row in rows:
            tables.add(table, row)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert lines == [train_step.HEAD[0], "| a | 2 |", "| b | 5 |", train_step.ASIDE_HEAD[0], "| launch at 64 px | 3 |"]
