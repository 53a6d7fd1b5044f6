"""Each page for users has a Chinese sister that says the same: headings, tables, code, options, names and numbers agree.

The commands of the Chinese pages are not run: they are the same as those of the English pages, which the tests of each page run.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from pathlib import Path

import pytest
from user_pages import (
    ENGLISH_PAGES,
    ROOT,
    anchors,
    blocks,
    chapters,
    names,
    numbers,
    options,
    prose,
    read_page,
    shape,
    sister,
    without_comments,
)

PAIRS = {name: (read_page(f"docs/{name}"), read_page(f"docs/{sister(name)}")) for name in ENGLISH_PAGES}
ALL_PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PAGES = pytest.mark.parametrize("name", PAIRS)


def title(chapter: str) -> str:
    return chapter.strip().splitlines()[0].lstrip("# ")


def differences(english: Counter | set, chinese: Counter | set) -> list[str]:
    """What is missing where."""
    english, chinese = Counter(english), Counter(chinese)
    missing = [f"missing in Chinese: {key} (x{n})" for key, n in (english - chinese).items()]
    return missing + [f"in Chinese alone: {key} (x{n})" for key, n in (chinese - english).items()]


@PAGES
def test_headings_tables_and_lists_agree(name):
    english, chinese = (shape(page) for page in PAIRS[name])
    assert english == chinese, "\n".join(difflib.unified_diff(english, chinese, "English", "Chinese", lineterm=""))


@PAGES
def test_code_agrees_but_for_comments(name):
    english, chinese = ([(language, without_comments(code)) for language, code in blocks(page)] for page in PAIRS[name])
    assert english == chinese


@PAGES
def test_the_same_options_and_names_are_mentioned(name):
    english, chinese = PAIRS[name]
    assert not differences(options(english), options(chinese))
    assert not differences(names(prose(english)), names(prose(chinese)))


@PAGES
def test_each_chapter_has_the_same_numbers(name):
    pairs = zip(*(chapters(prose(page)) for page in PAIRS[name]), strict=True)
    found = {title(english): differences(Counter(numbers(english)), Counter(numbers(chinese))) for english, chinese in pairs}
    assert not {chapter: lines for chapter, lines in found.items() if lines}


@PAGES
def test_sisters_name_each_other_and_the_readme_names_both(name):
    english, chinese = PAIRS[name]
    assert f"[{sister(name)}]({sister(name)})" in chapters(english)[0]
    assert f"[{name}]({name})" in chapters(chinese)[0]
    readme = read_page("README.md")
    assert f"](docs/{name})" in readme and f"](docs/{sister(name)})" in readme


@PAGES
def test_chinese_pages_lead_to_chinese_pages(name):
    targets = [re.findall(r"\]\((?!http)([^)\s#]+)(#?)[^)\s]*\)", page) for page in PAIRS[name]]
    expected = [(sister(file) if file in PAIRS else file, anchor) for file, anchor in targets[0]]
    of_each_other = {(name, ""), (sister(name), "")}
    assert not differences(Counter(expected) - Counter(of_each_other), Counter(targets[1]) - Counter(of_each_other))


@pytest.mark.parametrize("name", ALL_PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", read_page(name)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(Path(path).read_text(encoding="utf-8")), target
