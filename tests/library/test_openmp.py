"""library/openmp.py: how waiting threads wait, by how busy the machine is."""

from __future__ import annotations

import os
import sys

import pytest

from library import openmp

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only GNU's OpenMP is set")


@pytest.fixture
def environment(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is as before afterwards
    monkeypatch.delenv("GOMP_SPINCOUNT")
    return monkeypatch


@pytest.mark.parametrize("busy, spins", [(0.1, openmp.QUIET_SPINS), (1.0, openmp.BUSY_SPINS)])
def test_on_a_busy_machine_threads_sleep_sooner(environment, busy, spins):
    environment.setattr(openmp, "busy_cores", lambda: busy)
    openmp.let_waiting_threads_sleep()
    assert os.environ["GOMP_SPINCOUNT"] == str(spins)
    assert openmp.machine_was_busy() == (busy == 1.0)


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_has_set_stays(environment, name):
    environment.setenv(name, "7")
    openmp.let_waiting_threads_sleep()
    assert os.environ[name] == "7" and ("GOMP_SPINCOUNT" in os.environ) == (name == "GOMP_SPINCOUNT")


def test_processes_of_one_run_do_not_count_each_other(environment):
    environment.setenv("LOCAL_WORLD_SIZE", "2")
    assert openmp.busy_cores() == 0
