"""The pages for users, as tests read them: blocks of code, prose, chapters, options and numbers."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FOR_DEVELOPERS = {"developing.md"}
ENGLISH_PAGES = sorted(
    path.name for path in DOCS.glob("*.md") if path.name not in FOR_DEVELOPERS and not path.stem.endswith("-zh")
)

UNITS = {"million": 10**6, "万": 10**4}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read_page(name: str) -> str:
    """A page below the repository's root, such as `docs/speed.md`."""
    return (ROOT / name).read_text(encoding="utf-8")


def sister(name: str) -> str:
    """The file name of the same page in Chinese."""
    return f"{Path(name).stem}-zh.md"


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a page."""
    return FENCED.findall(page)


def without_comments(content: str) -> str:
    return re.sub(r"[ \t]*#.*", "", content)


def prose(page: str) -> str:
    """A page without its fenced blocks and without the targets of its links."""
    return re.sub(r"\]\([^)\s]*\)", "]", FENCED.sub("", page))


def chapters(page: str) -> list[str]:
    """What stands before the first heading of the second level, and then what stands below each of them."""
    return page.split("\n## ")


def shape(page: str) -> list[str]:
    """The headings (`##`), table rows with their number of cells (`|3`) and list items (`-`) of a page, in order."""
    found = []
    for line in FENCED.sub("", page).splitlines():
        if heading := re.match(r"#+ ", line):
            found.append(heading[0].strip())
        elif line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            found.append(f"|{cells}")
        elif item := re.match(r"(-|\d+\.) ", line):
            found.append(item[1])
    return found


def options(text: str) -> set[str]:
    """The options that a text names, without a value: `--seed`."""
    return set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text))


def numbers(text: str) -> list[str]:
    """The numbers of a text: `1000` for 1,000, `14700000` for 14.7 million and for 1470 万, none for `fp16`."""
    pattern = r"(?<![A-Za-z_\d.])(\d+(?:,\d{3})+(?!\d)|\d+(?:\.\d+)?(?:e-?\d+)?)( million\b| ?万)?"
    found = re.findall(pattern, text)
    return [str(round(float(n) * UNITS[unit.strip()])) if unit else n.replace(",", "") for n, unit in found]


def names(text: str) -> set[str]:
    """What stands in inline code, but for that with words to fill in (`<name>`), which are translated."""
    return {re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text) if "<" not in span}


def anchors(page: str) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
