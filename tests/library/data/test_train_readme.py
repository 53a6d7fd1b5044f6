"""docs/train_README*.md: the examples load, and the tables of keys say what the code says.

The examples of the Chinese page are the same (tests/e2e/test_sister_pages.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from user_pages import blocks, read_page

from library.data.buckets import BucketRule
from library.data.config import UNSUPPORTED, datasets_from_file
from library.data.config_file import read_config_file
from library.data.config_keys import DATASET_KEYS, SHARED_KEYS, SUBSET_ONLY, DatasetConfig, DatasetDefaults, SubsetConfig

ENGLISH, CHINESE = read_page("docs/train_README.md"), read_page("docs/train_README-zh.md")
BOTH = pytest.mark.parametrize("guide", [ENGLISH, CHINESE], ids=["en", "zh"])
EXAMPLES = [content for language, content in blocks(ENGLISH) if language == "toml"]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_toml_example_loads(example, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("data.toml").write_text(example, encoding="utf-8")
    tables = read_config_file(Path("data.toml"))
    for subset in (s for d in tables["datasets"] for s in d["subsets"]):
        for folder in (Path(subset[key]) for key in ("image_dir", "conditioning_data_dir") if key in subset):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "1.png").touch()
        if "metadata_file" in subset:
            Path(subset["metadata_file"]).write_text("{}", encoding="utf-8")
    datasets = datasets_from_file(Path("data.toml"), DatasetDefaults())
    assert [len(d.subsets) for d in datasets] == [len(d["subsets"]) for d in tables["datasets"]]
    assert not caplog.text


def test_there_are_examples():
    assert len(EXAMPLES) >= 5


@BOTH
def test_every_key_is_in_the_tables_with_its_default_and_levels(guide):
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| ([GDS ]+) \| (.+) \|$", guide, re.MULTILINE)
    fields = {**DatasetConfig.model_fields, **SubsetConfig.model_fields}
    assert sorted(row[0] for row in rows) == sorted(DATASET_KEYS + SHARED_KEYS + SUBSET_ONLY)
    for key, default, levels, _ in rows:
        value = fields[key].default
        if fields[key].is_required():
            expected = "needed" if guide is ENGLISH else "必填"
        elif value is None:
            expected = "none" if guide is ENGLISH else "无"
        else:
            expected = f"`{value}`" if not isinstance(value, (bool, str)) else f"`{str(value).lower()}`"
            expected = f'`"{value}"`' if isinstance(value, str) else expected
        assert default == expected, key
        assert levels == ("S" if key in SUBSET_ONLY else "G D" if key in DATASET_KEYS else "G D S"), key


def test_refused_keys_are_listed():
    assert all(f"`{key}`" in ENGLISH for key in UNSUPPORTED)


@BOTH
def test_the_table_of_sizes_is_true(guide):
    rows = re.findall(r"^\| (\d+) x (\d+) \| (.+) \| (.+) \|$", guide, re.MULTILINE)
    assert len(rows) == 7
    subset = SubsetConfig(image_dir="x")
    for width, height, normal, no_upscale in rows:
        for text, keeps in ((normal, False), (no_upscale, True)):
            config = DatasetConfig(resolution=512, enable_bucket=True, bucket_no_upscale=keeps, subsets=(subset,))
            assignment = BucketRule(config).assign(int(width), int(height))
            text = normal if text in ("the same", "同左") else text
            sizes = [tuple(map(int, size)) for size in re.findall(r"(\d+) x (\d+)", text)]
            assert sizes[-1] == assignment.bucket, (width, height, text)
            if len(sizes) == 2:
                assert sizes[0] == assignment.resized, (width, height, text)
