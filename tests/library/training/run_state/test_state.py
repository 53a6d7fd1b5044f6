"""Folders of states: whole or not there, found again, read without running code."""

from __future__ import annotations

import io
import json
import os
import zlib

import pytest
import torch

from library.errors import RunFailed, UserError
from library.training.run_state import state as state_module
from library.training.run_state.snapshot import load_optimizer
from library.training.run_state.state import State, find_state, read_state, write_state


def a_state(step: int, name: str | None = "mine") -> State:
    return State(
        {"step": step, "output_name": name},
        {"network": {"a": torch.full((3,), float(step))}},
        {"optimizer": {"state": {0: {"m": torch.ones(2)}}}},
    )


def test_what_is_written_is_read(tmp_path):
    write_state(tmp_path / "mine-state", a_state(3))
    state = read_state(tmp_path / "mine-state")
    assert state.record["step"] == 3 and state.tensors["network"]["a"].tolist() == [3, 3, 3]
    assert torch.equal(state.objects["optimizer"]["state"][0]["m"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["mine-state"]


def test_the_newest_whole_one_is_found(tmp_path, capsys):
    for step in (1, 2, 3):
        write_state(tmp_path / f"mine-step{step:08d}-state", a_state(step))
    write_state(tmp_path / "other-state", a_state(9, "other"))
    assert find_state(tmp_path, "mine").name == "mine-step00000003-state"
    assert find_state(tmp_path, "unknown").name == "other-state"
    assert find_state(tmp_path / "other-state", "mine").name == "other-state"
    file = tmp_path / "mine-step00000003-state" / "network.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert find_state(tmp_path, "mine").name == "mine-step00000002-state"
    assert "network.safetensors is cut off or damaged; trying the state before it" in capsys.readouterr().out
    with pytest.raises(UserError, match="cut off or damaged"):
        read_state(tmp_path / "mine-step00000003-state")
    (tmp_path / "mine-step00000002-state" / "optimizer.pt").unlink()
    assert find_state(tmp_path, "mine").name == "mine-step00000001-state"


def test_nothing_to_resume_from_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        find_state(tmp_path / "nowhere")
    (tmp_path / "mine-state").mkdir()
    with pytest.raises(UserError, match="it holds no whole state"):
        find_state(tmp_path)
    (tmp_path / "mine-state" / "state.json").write_text('{"version": 1', encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        find_state(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_state(tmp_path / "mine-state")


@pytest.mark.parametrize("operation", ["fsync", "replace", "mkdir"])
def test_a_state_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch, operation):
    folder = tmp_path / "mine-state"
    write_state(folder, a_state(1))
    calls = iter(range(100))

    original = getattr(os, operation)

    def fail(*args, **kwargs):
        if next(calls) == (1 if operation == "replace" else 0):
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(RunFailed, match="No space left"):
        write_state(folder, a_state(2))
    monkeypatch.undo()
    assert read_state(find_state(tmp_path)).record["step"] == 1


def test_code_in_a_state_never_runs_and_is_never_written(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "mine-state"
    with pytest.raises(RunFailed, match="state of the optimizer holds more than tensors"):
        write_state(folder, State({}, {}, {"optimizer": Evil()}))
    write_state(folder, a_state(1))
    buffer = io.BytesIO()
    torch.save({"value": Evil()}, buffer)
    evil = buffer.getvalue()
    (folder / "optimizer.pt").write_bytes(evil)
    record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    record["files"]["optimizer.pt"] = [len(evil), zlib.crc32(evil)]
    (folder / "state.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match="optimizer.pt was not opened"):
        read_state(folder)
    assert not (tmp_path / "ran").exists()


def test_a_state_of_another_version_is_refused(tmp_path, monkeypatch):
    write_state(tmp_path / "mine-state", a_state(1))
    monkeypatch.setattr(state_module, "VERSION", 2)
    with pytest.raises(UserError, match="another version of this suite"):
        read_state(tmp_path / "mine-state")


def test_the_optimizer_s_numbers_keep_their_format():
    def made() -> torch.optim.Optimizer:
        weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        return torch.optim.AdamW([weight])

    first, second = made(), made()
    weight = first.param_groups[0]["params"][0]
    precise = torch.full((4,), 1 / 3)
    first.state[weight] = {"step": torch.tensor(5.0), "exp_avg": precise, "exp_avg_sq": precise}
    load_optimizer(second, first.state_dict())
    loaded = second.state[second.param_groups[0]["params"][0]]
    assert loaded["exp_avg"].dtype == torch.float32 and torch.equal(loaded["exp_avg"], precise)
    assert loaded["step"].item() == 5


def test_a_file_given_to_resume_from_is_named_with_the_cure(tmp_path):
    write_state(tmp_path / "a-state", a_state(1))
    inside = next((tmp_path / "a-state").glob("*.safetensors"))
    with pytest.raises(UserError, match=r"this is a file, and a state is a folder; give its folder .*a-state"):
        find_state(inside)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(UserError, match=r"give --network_weights=.*a\.safetensors"):
        find_state(tmp_path / "a.safetensors")


def test_a_state_in_a_folder_that_is_no_utf8_is_read(not_utf8):
    write_state(not_utf8 / "mine-state", a_state(3))
    assert read_state(find_state(not_utf8, "mine")).tensors["network"]["a"].tolist() == [3, 3, 3]
