from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from library.data.images import OWN_IMAGE
from library.errors import RunFailed
from library.training.outputs.loss_plot import try_loss_plot, write_loss_plot
from library.training.outputs.tracking import LossRecord


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
def test_a_loss_that_is_not_finite_is_named_with_its_step_and_images(value):
    record = LossRecord(window=3)
    record.add(7, torch.tensor(value), ["x.png", "y.png"])
    with pytest.raises(RunFailed, match=r"at step 7 \(images: x.png, y.png\)"):
        record.add(8, torch.tensor(1.0), [])


@pytest.mark.parametrize("count", [1, 2, 100])
def test_the_plot_is_an_image(tmp_path, count):
    record = LossRecord(window=10)
    for step in range(count):
        record.add(step, torch.tensor(1 / (step + 1)), [])
    record.flush()
    write_loss_plot(record, tmp_path / "loss.png", "loss")
    assert Image.open(tmp_path / "loss.png").size[0] > 400


@pytest.mark.parametrize("title", ["a$b", "price $5$6{", "caf\udce9\x1b[2J", "日本語 \U0001f600", r"\frac{1}{2} $\frac{$"])
def test_a_plot_takes_any_name_as_it_is(tmp_path, title, recwarn):
    record = LossRecord(window=3)
    record.steps, record.values = [1, 2], [0.5, 0.25]
    assert try_loss_plot(record, tmp_path / "loss.png", title) == str(tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").text[OWN_IMAGE] == "loss plot" and not recwarn.list


def test_a_plot_that_cannot_be_drawn_is_reported_and_ends_nothing(tmp_path):
    record = LossRecord(window=3)
    assert try_loss_plot(record, tmp_path / "a.png", "a") == "not drawn (there are no losses)"
    record.steps, record.values = [1], [0.5]
    (tmp_path / "file").touch()
    assert try_loss_plot(record, tmp_path / "file" / "a.png", "a").startswith("not drawn (cannot write ")
