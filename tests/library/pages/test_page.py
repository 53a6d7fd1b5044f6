from __future__ import annotations

import json
import re

import numpy as np
import pytest

from library.errors import UserError
from library.pages import chart_script
from library.pages.curves import evenly, extremes, running_mean
from library.pages.page import ASSETS, as_json, folder_of, write_page


def test_data_comes_back_and_cannot_end_its_element(tmp_path):
    data = {"caption": "</script><script>alert(1)</script><!--", "odd": "caf\udce9", "number": 0.25}
    write_page(tmp_path / "a.html", "run", "<b>title", data)
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(found[1]) == {**data, "odd": "caf\ufffd"}
    assert "&lt;b&gt;title" in text and "<b>title" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_what_is_no_json_is_refused():
    with pytest.raises(ValueError):
        as_json({"loss": float("nan")})


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "file").write_text("old", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        write_page(tmp_path / "file" / "a.html", "run", "a", {})
    assert (tmp_path / "file").read_text(encoding="utf-8") == "old"


def test_no_program_reads_markup_or_the_network():
    """Texts of users are shown by textContent and append alone."""
    for path in ASSETS.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|https?:", text), path.name


def test_both_languages_have_all_words():
    text = (ASSETS / "words.js").read_text(encoding="utf-8")
    english, chinese = text.split("\n  zh: {")
    keys = [set(re.findall(r"(\w+): \"", part)) for part in (english, chinese)]
    assert keys[0] == keys[1] and len(keys[0]) > 80
    used = {key for path in ASSETS.glob("*.js") for key in re.findall(r'\bsay\("(\w+)"', path.read_text(encoding="utf-8"))}
    assert used <= keys[0]


def test_a_long_curve_keeps_its_spikes():
    steps, values = np.arange(100_000), np.random.default_rng(0).random(100_000)
    values[[777, 55_555]] = 50, -50
    kept_steps, kept = extremes(steps, values)
    assert len(kept) <= 1800 and kept_steps == sorted(kept_steps)
    assert kept[kept_steps.index(777)] == 50 and kept[kept_steps.index(55_555)] == -50
    assert extremes(steps[:5], values[:5])[0] == [0, 1, 2, 3, 4]


def test_means_and_thinning():
    assert running_mean([1, 2, 3, 6], 2).tolist() == [1.5, 2.5, 4.5]
    steps, values = evenly(range(1001), range(1001), 11)
    assert steps == values == [float(step) for step in range(0, 1001, 100)]


def test_the_chart_script_is_laid_once_or_not_at_all(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "mine.html")
    folder.mkdir()
    assert chart_script.copy_chart_script(folder) == "mine-page/plotly.min.js"
    before = (folder / "plotly.min.js").stat()
    assert before.st_size > 1e6
    chart_script.copy_chart_script(folder)
    assert (folder / "plotly.min.js").stat().st_ino == before.st_ino
    monkeypatch.setattr(chart_script.importlib.util, "find_spec", lambda name: None)
    assert chart_script.copy_chart_script(folder) is None
