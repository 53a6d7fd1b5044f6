"""benchmarks/scale.py with few images."""

from __future__ import annotations

from benchmarks import scale


def test_figures_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "LINKS", 3)
    scale.make_images(tmp_path / "images", 100)
    found = scale.measure(tmp_path / "images", world=4)
    assert found["images"] == 100 and found["index"] > 0 and found["batch"] > 0 and found["first"] > 0
    assert found["shared"][0] <= 25 <= found["shared"][1] and found["largest"] >= 1
    assert scale.row(found).startswith("| 100 | ") and "4 processes share the 100" in scale.shares_text(found, 4)


def test_images_lie_in_nine_buckets(tmp_path):
    scale.make_images(tmp_path / "images", 18)
    table = scale.index(tmp_path / "images").table
    assert len(table.buckets) == 9
    assert set(table.captions) == {scale.CAPTION.format(number) for number in range(9)}
