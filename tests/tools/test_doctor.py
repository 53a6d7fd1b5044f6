from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from library.doctor import installation, self_test
from library.doctor.self_test import Row
from tools import doctor

DOCTOR = str(Path(__file__).resolve().parents[2] / "tools" / "doctor.py")


def test_the_report_names_what_is_here_and_ends_well(tmp_path):
    done = subprocess.run([sys.executable, DOCTOR], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "Python",
        "torch",
        "CPU",
        "8-bit optimizers",
        "xformers",
        "opencv",
        "torch_compile",
        "mixed precision",
        "training can run here",
    ):
        assert words in done.stdout
    assert not done.stderr
    assert re.search(r"ok    8-bit optimizers       works on the", done.stdout), done.stdout


def test_a_missing_package_is_named_with_its_cure_and_the_exit_code_is_1(monkeypatch, capsys):
    real = installation.installed
    monkeypatch.setattr(installation, "installed", lambda package: None if package == "torch" else real(package))
    assert doctor.main(["--self_test"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"BAD   torch +missing; run: pip install torch==", printed) and "training cannot run here: torch" in printed
    assert "This machine" not in printed and "Self test" not in printed


@pytest.fixture
def made_rows(monkeypatch) -> list[Row]:
    """A self test of these rows, which takes no time."""
    rows = [
        Row("float32, CPU", "works", loss=0.25, seconds_per_step=0.5, memory=0.7),
        Row("bf16", "fails", "no kernel for this"),
        Row("fp16", "not here", "fp16 needs a GPU"),
    ]
    monkeypatch.setattr(self_test, "self_test", lambda trials: rows)
    return rows


def test_json_holds_what_the_text_says(made_rows, capsys):
    assert doctor.main(["--self_test", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["training_can_run"] is True and data["cannot_run_because_of"] == []
    assert {"section": "This machine", "name": "CPU"}.items() <= next(f for f in data["findings"] if f["name"] == "CPU").items()
    assert [(row["name"], row["state"], row["reason"]) for row in data["self_test"]] == [
        (row.name, row.state, row.reason) for row in made_rows
    ]
    assert data["self_test"][0]["loss"] == 0.25


def test_json_without_a_self_test_has_none(capsys):
    assert doctor.main(["--json"]) == 0
    assert "self_test" not in json.loads(capsys.readouterr().out)


def test_a_trial_that_fails_is_a_row_and_the_exit_code_stays_0(made_rows, capsys):
    assert doctor.main(["--self_test"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"bf16 +fails +no kernel for this", printed) and "training can run here" in printed


def test_without_the_plainest_training_nothing_can_be_trained(made_rows, capsys):
    made_rows[0] = Row("float32, CPU", "fails", "exit code 1")
    assert doctor.main(["--self_test"]) == 1
    assert "training cannot run here: float32, CPU" in capsys.readouterr().out


def test_an_unknown_option_names_the_nearest():
    done = subprocess.run([sys.executable, DOCTOR, "--selftest"], capture_output=True, encoding="utf-8", timeout=100)
    assert done.returncode == 2 and "did you mean '--self_test'?" in done.stderr and not done.stdout


@pytest.mark.skipif(os.name == "nt", reason="pipes of Windows raise at another moment")
def test_a_reader_that_has_seen_enough_ends_it_quietly():
    """`tools/doctor.py | head`"""
    process = subprocess.Popen([sys.executable, DOCTOR], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(200) == 0 and "Traceback" not in errors and "BrokenPipe" not in errors


def test_the_form_for_faults_asks_for_the_table():
    form = Path(DOCTOR).parents[1] / ".github" / "ISSUE_TEMPLATE" / "bug.yml"
    assert "`python tools/doctor.py --self_test`" in form.read_text(encoding="utf-8")
