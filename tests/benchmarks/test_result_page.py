"""benchmarks/result_page.py keeps the parts that are not measured anew."""

from __future__ import annotations

from benchmarks.result_page import write_parts


def test_parts_stay_until_they_are_measured_again(tmp_path):
    path = tmp_path / "results.md"
    for sections in ({"memory": ["1"], "quality": ["2"]}, {"quality": ["3"]}):
        write_parts(path, "some.py", "What it is.\n\n    python some.py\n\nmemory: that.\n", sections)
    text = path.read_text(encoding="utf-8")
    assert text == "# benchmarks/some.py\n\nmemory: that.\n\n## memory\n\n1\n\n## quality\n\n3\n"
