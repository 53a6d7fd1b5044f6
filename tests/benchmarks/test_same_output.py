"""benchmarks/same_output.py: what counts as the same, and a recording of one small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from benchmarks import same_output


def recording(folder: Path, run: str = "run") -> Path:
    """An empty recording of one run; gives the run's folder."""
    facts = {"suite": f"{folder}/suite", "inputs": f"{folder}/inputs", "folder": str(folder), "digest of the inputs": "same"}
    (folder / run).mkdir(parents=True)
    (folder / same_output.RECORD).write_text(json.dumps(facts), encoding="utf-8")
    return folder / run


def write_files(
    run: Path, value: float = 1.0, date: str = "2026-01-01T10:00:00", rank: str = "4", line: str = "saved", prompt: str = "a cat"
) -> None:
    """A LoRA file, a state's JSON, an image and printed text."""
    save_file({"up": torch.tensor([0.0, value])}, run / "mine.safetensors", {"ss_network_dim": rank, "modelspec.date": date})
    (run / "state.json").write_text(f'{{"step": 3, "saved_at": {hash(date) % 1000}, "rank": "{rank}"}}\n', encoding="utf-8")
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", prompt)
    Image.new("RGB", (4, 4), (int(value), 0, 0)).save(run / "0.png", pnginfo=text)
    (run / "train.out.txt").write_text(f"{line} {run}/mine.safetensors in {len(run.name)}.5 s\n", encoding="utf-8")


def compared(tmp_path: Path, capsys, **changed) -> tuple[int, str]:
    """Number of runs that differ, and what is printed, if the second recording is changed so."""
    write_files(recording(tmp_path / "one"))
    write_files(recording(tmp_path / "another"), **changed)
    return same_output.compare(tmp_path / "one", tmp_path / "another"), capsys.readouterr().out


def test_times_and_folders_may_differ(tmp_path, capsys):
    count, printed = compared(tmp_path, capsys, date="2027-02-02T11:11:11")
    assert count == 0 and printed.startswith("same     run") and "1 of 1 runs are the same" in printed


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"rank": "8"}, ["mine.safetensors: metadata ss_network_dim: 4 became 8", 'state.json: -{"step": 3']),
        ({"line": "kept"}, ["train.out.txt: -saved FOLDER/run/mine.safetensors in SECONDS", "train.out.txt: +kept"]),
        ({"prompt": "a dog"}, ["0.png: PNG text prompt: a cat became a dog"]),
        (
            {"value": 3.0},
            [
                "mine.safetensors: tensor up: 1 of 2 numbers differ, by at most 2",
                "0.png: 33.3% of the values differ, by at most 2",
            ],
        ),
    ],
)
def test_what_differs_is_named(tmp_path, capsys, changed, expected):
    count, printed = compared(tmp_path, capsys, **changed)
    assert count == 1 and all(part in printed for part in expected), printed
    assert "DIFFERS  run" in printed and "0 of 1 runs are the same" in printed


def test_one_bit_and_the_dtype_count(tmp_path, capsys):
    runs = [recording(tmp_path / name) for name in ("one", "another")]
    for run, zero, dtype in zip(runs, (0.0, -0.0), (torch.float16, torch.bfloat16), strict=True):
        save_file({"zero": torch.tensor([zero]), "kind": torch.ones(2, dtype=dtype)}, run / "a.safetensors")
    assert same_output.compare(tmp_path / "one", tmp_path / "another") == 1
    printed = capsys.readouterr().out
    assert "tensor zero" in printed and "tensor kind: torch.float16 (2,) became torch.bfloat16 (2,)" in printed


def test_missing_files_tensors_and_runs(tmp_path, capsys):
    runs = [recording(tmp_path / name) for name in ("one", "another")]
    recording_only_there = tmp_path / "another" / "more"
    recording_only_there.mkdir()
    (recording_only_there / "more.bin").write_bytes(b"1")
    (runs[0] / "gone.bin").write_bytes(b"1")
    for run, names in zip(runs, ("ab", "bc"), strict=True):
        save_file({name: torch.ones(1) for name in names}, run / "a.safetensors")
        (run / "b.bin").write_bytes(names.encode())
    assert same_output.compare(tmp_path / "one", tmp_path / "another") == 2
    printed = capsys.readouterr().out
    assert f"gone.bin: missing in {tmp_path / 'another'}" in printed and f"more.bin: missing in {tmp_path / 'one'}" in printed
    assert (
        "tensor a: only in the first" in printed
        and "tensor c: only in the second" in printed
        and "b.bin: bytes differ" in printed
    )


def test_a_checkpoint_is_its_values_and_files_whatever_its_folder_is_called(tmp_path, capsys):
    for name, value in (("one", 1.0), ("another", 1.0), ("third", 2.0)):
        run = recording(tmp_path / name)
        torch.save({"state_dict": {"up": torch.tensor([value])}}, run / f"{name}.pt")  # the folder in it is named after the file
        (run / f"{name}.pt").rename(run / "mine.ckpt")
    assert (tmp_path / "one/run/mine.ckpt").read_bytes() != (tmp_path / "another/run/mine.ckpt").read_bytes()
    assert same_output.compare(tmp_path / "one", tmp_path / "another") == 0
    assert same_output.compare(tmp_path / "one", tmp_path / "third") == 1
    assert "mine.ckpt: value /state_dict/up: 1 of 1 numbers differ, by at most 1" in capsys.readouterr().out


def test_times_in_names_and_numpys_own_generator_may_differ(tmp_path):
    for name, time, key in (("one", "20260101100000", 1), ("another", "20270202111111", 2)):
        run = recording(tmp_path / name)
        (run / f"mine_000002_00_{time}_1.png").write_bytes(b"as it is")
        torch.save({"value": {"numpy": ["MT19937", torch.tensor([key]), 624]}}, run / "random.pt")
        (run / "state.json").write_text(json.dumps({"random.pt": [17121, key]}, indent=1), encoding="utf-8")
    assert same_output.compare(tmp_path / "one", tmp_path / "another") == 0


def test_recordings_of_other_inputs_are_refused(tmp_path):
    for name in ("one", "another"):
        recording(tmp_path / name)
    facts = json.loads((tmp_path / "one" / same_output.RECORD).read_text(encoding="utf-8"))
    (tmp_path / "one" / same_output.RECORD).write_text(json.dumps({**facts, "digest of the inputs": "other"}), encoding="utf-8")
    with pytest.raises(SystemExit, match="different inputs"):
        same_output.compare(tmp_path / "one", tmp_path / "another")


def test_record_keeps_files_text_and_exit_codes(tmp_path, capsys):
    inputs = tmp_path / "inputs"
    for name in ("one", "another"):
        assert same_output.record(tmp_path / name, same_output.ROOT, inputs, ["check", "resize"]) == 0
    folder = tmp_path / "one"
    assert "number of LoRA modules" in (folder / "check" / "check_lora_weights.out.txt").read_text(encoding="utf-8")
    assert (folder / "resize" / "out.safetensors").is_file()
    assert (folder / "resize" / "resize_lora.code.txt").read_text(encoding="utf-8") == "0\n"
    (inputs / "lora_a.safetensors").write_bytes(b"damaged")
    assert same_output.record(tmp_path / "broken", same_output.ROOT, inputs, ["check"]) == 1
    assert "exit code 2: " in capsys.readouterr().out
    assert same_output.compare(folder, tmp_path / "another") == 0
    with pytest.raises(SystemExit, match="no run lierlaa"):
        same_output.record(folder, same_output.ROOT, inputs, ["lierlaa"])
