from __future__ import annotations

import pytest

from library.doctor import installation


def test_extras_say_which_option_needs_them(monkeypatch):
    monkeypatch.setattr(installation, "installed", lambda package: None)
    texts = {finding.name: finding.text for finding in installation.extra_packages()}
    assert "--optimizer_type Lion" in texts["lion-pytorch"] and "pip install lion-pytorch==" in texts["lion-pytorch"]


def test_what_fails_is_a_note_and_not_a_crash():
    def broken() -> str:
        raise OSError("libcudart.so.12:\n cannot open")

    finding = installation.tried("8-bit optimizers", broken, "reinstall")
    assert finding.state == "note" and finding.text == "libcudart.so.12: cannot open; reinstall"
    assert installation.tried("opencv", broken, "reinstall", needed=True).state == "bad"


@pytest.mark.parametrize("version, state", [((3, 9), "bad"), ((3, 10), "ok"), ((3, 13), "ok"), ((3, 14), "note")])
def test_versions_of_python(monkeypatch, version, state):
    monkeypatch.setattr(installation.sys, "version_info", (*version, 0))
    assert installation.python_version().state == state
