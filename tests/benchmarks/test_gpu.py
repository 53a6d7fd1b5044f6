"""benchmarks/gpu.py in a tiny size on the CPU: every job gives its rows, and what fails ends neither the others nor the page."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from benchmarks import gpu, gpu_measures
from benchmarks.gpu_measures import Job, Workspace, measure
from library.models import loading
from library.testing import small_stable_diffusion
from library.training import setup
from library.training.checks import preflight
from library.training.options import parse_options
from tests.library.training.small_runs import read_tokenizers_once, use_two_blocks

MACHINE = Job("machine", "machine")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Where the machine's own job has put the models."""
    workspace = Workspace(tmp_path_factory.mktemp("gpu"), tiny=True)
    assert not [row for row in measure(MACHINE, workspace) if "failed" in row]
    return workspace


@pytest.fixture
def small_runs(monkeypatch):
    """Runs of a tenth of a second, which compile nothing."""
    use_two_blocks(monkeypatch.setattr)
    read_tokenizers_once(monkeypatch.setattr)
    monkeypatch.setattr(preflight, "check_backend", lambda *args: None)
    monkeypatch.setattr(setup, "compile_model", lambda *args: None)
    monkeypatch.setattr(loading, "load_stable_diffusion", lambda *args, **kwargs: small_stable_diffusion())


def test_every_job_gives_its_rows(workspace, small_runs, tmp_path):
    page = gpu.Page(tmp_path / "gpu.md", "a machine")
    jobs = [
        replace(gpu.in_small(job), needs=None, batches=job.batches[:1])
        for job in gpu.JOBS
        if job.family == "sd1" or job.kind == "caching"
    ]
    gpu.measure_all(jobs, workspace, page, minutes=5, run=gpu.here)
    assert [row for rows in page.rows.values() for row in rows if "failed" in row] == []
    assert len(page.rows["steps"]) == sum(len(job.ways) * len(job.batches) for job in jobs if job.kind == "steps")
    for row in page.rows["steps"]:
        assert row["images/s"] > 0 and row["TFLOP/s"] > 0 and row["peak, GB"] > 0 and row["first step, s"] > 0
    plain = [row for row in page.rows["steps"] if row["row"] == "SD 1.5, float32, batch 1"]
    assert all(row["of the floor's time"] > 0 for row in plain + page.rows["caching"] + page.rows["drawing"]) and plain
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert all(f"## {title}\n" in text for title in gpu.TITLES.values()) and "## Conditions\n\na machine" in text


def test_words_of_every_job_are_options(tmp_path):
    for job in gpu.JOBS:
        for words in job.ways.values():
            for batch in job.batches:
                case = gpu_measures.Case(512, batch, job.precision, job.case)
                options = parse_options([*case.words(tmp_path, 3), "--no_report", *words])
                assert options.precision.torch_compile == ("compiled" in job.name or "graphs" in job.name)
    assert {job.kind for job in gpu.JOBS} == gpu_measures.KINDS.keys() == gpu.TITLES.keys()
    assert len({job.name for job in gpu.JOBS}) == len(gpu.JOBS)
    assert gpu.JOBS[0].kind == "machine"  # it makes the files of all others


def test_a_row_that_fails_is_named_and_the_next_one_follows(workspace, small_runs, monkeypatch):
    ways = {"odd": ["--optimizer_type=NoSuchThing"], "": []}
    odd, plain = measure(Job("x", "steps", precision="no", ways=ways), workspace)
    assert odd["row"] == "SD 1.5, float32, odd, batch 1" and "NoSuchThing" in odd["failed"] and plain["it/s"] > 0
    (row,) = measure(Job("x", "steps", needs="no_such_package"), workspace)
    assert row == {"row": "x", "failed": "the package no_such_package is not there"}

    def out_of_memory(*args):
        raise gpu_measures_error()

    def gpu_measures_error():
        import torch

        return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(gpu_measures, "step_row", out_of_memory)
    assert [row["failed"] for row in measure(Job("x", "steps"), workspace)] == ["out of memory"]


@pytest.mark.parametrize("program, rows", [
    ("print('ROW {\"row\": \"a\", \"it/s\": 1.5}'); raise SystemExit('no such device')",
     [{"row": "a", "it/s": 1.5}, {"row": "x", "failed": "the process ended with 1: no such device"}]),
    ("import os; print('ROW {\"row\": \"a\"}', flush=True); os.abort()",
     [{"row": "a"}, {"row": "x", "failed": "the process ended"}]),
    ("import time; print('ROW {\"row\": \"a\"}', flush=True); time.sleep(60)",
     [{"row": "a"}, {"row": "x", "failed": "not done after"}]),
])  # fmt: skip
def test_a_process_that_ends_badly_keeps_its_rows(tmp_path, monkeypatch, program, rows):
    script = tmp_path / "job.py"
    script.write_text(program, encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(script))
    found = list(gpu.in_own_process(Job("x", "steps"), Workspace(tmp_path, True), 6))
    assert found[:-1] == rows[:-1] and found[-1]["failed"].startswith(rows[-1]["failed"])


def test_jobs_for_which_there_is_no_time_are_named(tmp_path, capsys):
    page = gpu.Page(tmp_path / "gpu.md", "a machine")
    gpu.measure_all([Job("late", "steps")], Workspace(tmp_path, True), page, minutes=0.1)
    assert "- late: not begun, the time was over" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_the_command_passes_jobs_to_processes(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", f"--folder={workspace.folder}", "--job=machine"])
    gpu.main()
    assert capsys.readouterr().out.count(gpu.MARK) == 6
    assert [job.name for job in gpu.chosen_jobs(["drawing"], tiny=True)] == ["machine", "SD 1.5, drawing"]
