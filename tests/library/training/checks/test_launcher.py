from __future__ import annotations

import pytest

from library.errors import UserError
from library.training.checks.launcher import check_launcher


@pytest.mark.parametrize("variable, engine", [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")])
def test_engines_of_the_launcher_are_refused_in_one_line(variable, engine, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"asks for {engine}, which is not supported; .*`accelerate config`"):
        check_launcher()
    monkeypatch.setenv(variable, "false")
    check_launcher()
