from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from library.errors import RunFailed
from library.training.loss_plot import write_loss_plot
from library.training.tracking import LossRecord


def test_a_loss_is_read_one_batch_late():
    record = LossRecord(window=2)
    record.add(1, torch.tensor(4.0), ["a"])
    assert record.current is None and record.average is None
    record.add(2, torch.tensor(2.0), ["b"])
    assert record.current == 4.0
    record.flush()
    assert (record.steps, record.values, record.current) == ([1, 2], [4.0, 2.0], 2.0)


def test_the_average_is_over_the_last_epoch():
    record = LossRecord(window=3)
    for step in range(10):
        record.add(step, torch.tensor(float(step)), [])
    record.flush()
    assert record.average == pytest.approx(8.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_with_its_step_and_pictures(value):
    record = LossRecord(window=3)
    record.add(7, torch.tensor(value), ["x.png", "y.png"])
    with pytest.raises(RunFailed, match=r"at step 7 \(pictures: x.png, y.png\)"):
        record.add(8, torch.tensor(1.0), [])


@pytest.mark.parametrize("count", [1, 2, 100])
def test_the_plot_is_a_picture(tmp_path, count):
    record = LossRecord(window=10)
    for step in range(count):
        record.add(step, torch.tensor(1 / (step + 1)), [])
    record.flush()
    write_loss_plot(record, tmp_path / "loss.png", "loss")
    assert Image.open(tmp_path / "loss.png").size[0] > 400
