"""Charts are drawn by plotly's script, which is copied beside a page from the installed package; that is not imported."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from library.files import atomic_write

NAME = "plotly.min.js"


def copy_chart_script(folder: Path) -> str | None:
    """Copy the script into a page's folder unless it is there. Returns its path as seen from the page.

    None: plotly is not installed, and the page does without a chart. Raises UserError if it cannot be written.
    """
    spec = importlib.util.find_spec("plotly")
    source = Path(spec.origin).parent / "package_data" / NAME if spec and spec.origin else None
    if source is None or not source.is_file():
        return None
    target = folder / NAME
    if not target.is_file() or target.stat().st_size != source.stat().st_size:
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)
    return f"{folder.name}/{NAME}"
