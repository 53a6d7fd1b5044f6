"""A model's file is read while libraries are imported and the checks run; what cannot be read so is left to the checks."""

from __future__ import annotations

import pytest
import torch

from library.models.saving import save_stable_diffusion
from library.testing import small_stable_diffusion
from library.training import entry
from library.training.memory.precision import NumberFormats
from library.training.options import parse_options
from library.training.setup import begin_reading, load_model
from tests.library.training.small_runs import image_folder, words_of_a_run

CPU = torch.device("cpu")


class Stopped(Exception):
    pass


@pytest.fixture
def path(tmp_path):
    save_stable_diffusion(small_stable_diffusion(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def options(tmp_path):
    images = image_folder(tmp_path / "images", 2)
    words = words_of_a_run(images, tmp_path / "out")
    return lambda model: parse_options([*words, f"--pretrained_model_name_or_path={model}"])


def test_what_was_read_ahead_is_the_model(path, options):
    chosen = options(path)
    formats = NumberFormats.of(chosen.training, chosen.precision)
    reading = begin_reading(chosen.model, formats, CPU)
    assert reading is not None and reading.path == path
    ahead, plain = (load_model(chosen.model, formats, CPU, begun).denoiser.state_dict() for begun in (reading, None))
    assert ahead.keys() == plain.keys() and all(torch.equal(ahead[name], plain[name]) for name in plain)


def test_a_run_reads_before_its_checks(path, options, monkeypatch):
    begun = []

    def checks(*args):
        raise Stopped

    monkeypatch.setattr(entry, "begin_reading", lambda *args: begun.append(begin_reading(*args)) or begun[0])
    monkeypatch.setattr(entry, "preflight", checks)
    with pytest.raises(Stopped):
        entry.train(options(path))
    assert begun[0].path == path and begun[0].file._file.closed, "and lets go of the file if the checks fail"


@pytest.mark.parametrize(
    "name", ["missing.safetensors", "model.ckpt", "wrong.safetensors", "folder.safetensors", "x" * 300 + ".safetensors"]
)
def test_other_models_are_left_to_the_checks(name, options, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    (tmp_path / "wrong.safetensors").write_bytes(b"no model")
    (tmp_path / "folder.safetensors").mkdir()
    chosen = options(tmp_path / name)
    assert begin_reading(chosen.model, NumberFormats.of(chosen.training, chosen.precision), CPU) is None
