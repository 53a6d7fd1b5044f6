from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import doctor

ROOT = Path(__file__).resolve().parents[2]


def test_the_report_names_what_is_here_and_ends_well(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "doctor.py")], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=200
    )
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
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda package: None if package == "torch" else real(package))
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"BAD   torch +missing; run: pip install torch==", printed) and "training cannot run here: torch" in printed
    assert "This machine" not in printed


def test_extras_say_which_option_needs_them(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    texts = {finding.name: finding.text for finding in doctor.extra_packages()}
    assert "--optimizer_type Lion" in texts["lion-pytorch"] and "pip install lion-pytorch==" in texts["lion-pytorch"]


def test_what_fails_is_a_note_and_not_a_crash():
    def broken() -> str:
        raise OSError("libcudart.so.12:\n cannot open")

    finding = doctor.tried("8-bit optimizers", broken, "reinstall")
    assert finding.state == "note" and finding.text == "libcudart.so.12: cannot open; reinstall"
    assert doctor.tried("opencv", broken, "reinstall", needed=True).state == "bad"


@pytest.mark.parametrize("version, state", [((3, 9), "bad"), ((3, 10), "ok"), ((3, 13), "ok"), ((3, 14), "note")])
def test_versions_of_python(monkeypatch, version, state):
    monkeypatch.setattr(doctor.sys, "version_info", (*version, 0))
    assert doctor.python_version().state == state
