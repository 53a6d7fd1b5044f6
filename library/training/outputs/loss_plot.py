"""`<name>-loss.png`: the losses of a run, its validation losses and its learning rates over the steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from library.data.images import OWN_IMAGE
from library.errors import one_line
from library.files import atomic_write
from library.pages.curves import running_mean
from library.safe_text import on_terminal
from library.training.outputs.tracking import LossRecord


def write_loss_plot(record: LossRecord, path: Path, title: str, validation: Sequence[tuple[int, float]] = ()) -> None:
    """Each batch pale, their running mean strong, validation dotted; learning rates below.

    validation: (step, loss).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4 if record.rates else 4), dpi=110)
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        2 if record.rates else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 2 if record.rates else 1]
    )
    draw_losses(panels[0, 0], record, title, validation)
    if record.rates:
        draw_rates(panels[1, 0], record)
    panels[-1, 0].set_xlabel("step")
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # it draws a box then
        figure.tight_layout()
        figure.savefig(temporary, metadata={OWN_IMAGE: "loss plot"})


def try_loss_plot(record: LossRecord, path: Path, title: str, validation: Sequence[tuple[int, float]] = ()) -> str:
    """The path of the plot, or why it was not drawn. Nothing is raised: the weights are saved by then."""
    if not record.values:
        return "not drawn (there are no losses)"
    try:
        write_loss_plot(record, path, title, validation)
    except Exception as error:  # a font that is damaged, a cache folder that cannot be written, a full disk
        return f"not drawn ({one_line(error)})"
    return str(path)


def draw_losses(axes, record: LossRecord, title: str, validation: Sequence[tuple[int, float]]) -> None:
    axes.plot(record.steps, record.values, color="#9ecae1", linewidth=0.8, label="each batch")
    width = record.smoothing
    if width > 1:
        axes.plot(
            record.steps[width - 1 :],
            running_mean(record.values, width),
            color="#08519c",
            linewidth=1.8,
            label=f"mean of {width}",
        )
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#d94801", marker="o", markersize=4, linestyle=":", label="validation")
    axes.set(ylabel="loss")
    axes.set_title(" ".join(on_terminal(title).split()), parse_math=False)  # else a $ in it begins a formula
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def draw_rates(axes, record: LossRecord) -> None:
    last = record.steps[-1] if record.steps else 0
    for name, points in record.rates.items():
        steps, rates = zip(*points, strict=True)
        axes.step([*steps, max(last, steps[-1])], [*rates, rates[-1]], where="post", linewidth=1.2, label=name)
    axes.set(ylabel="learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
