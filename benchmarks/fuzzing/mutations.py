"""Random bytes, texts and values, each from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

# Texts that people, programs and accidents put where another was expected.
ODD_TEXTS = (
    "", " ", "0", "-1", "1", "2.5", "1e400", "nan", "inf", "-inf", "1,5", "1,2,3", "true", "False", "None", "null",
    "é", "e\u0301", "日本", "😀", "a\u2028b", "\ufeffa", "a" * 5000, "../x", "a/b/c", "a\\b", "CON", "x.", "x ", ".",
    "..", "*", "?", "{", "}", "{a|", "[1,2", "(a:1.2", "a,b;c", "--x", "-", "=", "a=b", "1_000", "0x10", "１２", "%s",
    "$HOME", "~", "#", "'", '"', "\t", "a\nb", "a\0b", "\ud83d", "\udcff", "1" * 5000, "999999999999999999999", "<lora:a:1>",
    "BREAK", "file.safetensors", "a.png", "bf16", "fp32", "float16", "cuda:7", "auto",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    True, False, 0, 1, -1, 64, 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf"), [], {}, [1, 2], [[]], ["a", 1],
    {"a": {"b": []}}, None, *ODD_TEXTS,
)  # fmt: skip


def text(rng: random.Random) -> str:
    """An odd text, or a few letters of all of Unicode."""
    if rng.random() < 0.7:
        return rng.choice(ODD_TEXTS)
    letters = [
        rng.choice((rng.randrange(32, 127), rng.randrange(1, 0x3000), rng.randrange(0x1F000, 0x1FAFF)))
        for _ in range(rng.randrange(20))
    ]
    return "".join(map(chr, letters))


def argument(rng: random.Random) -> str:
    """A text as a command line can have it: without NUL."""
    return text(rng).replace("\0", "")


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The content with one to three accidents: cut off, bytes changed, put in, taken out or doubled."""
    data = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(data) + 1)
        accident = rng.randrange(7)
        if accident == 0:
            del data[place:]
        elif accident == 1:
            for _ in range(rng.randrange(1, 9)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
        elif accident == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 20))
        elif accident == 3:
            del data[place : place + rng.randrange(1, 50)]
        elif accident == 4:
            data[place:place] = data[place : place + rng.randrange(1, 200)]
        elif accident == 5 and data:  # the beginning is where headers are
            data[rng.randrange(min(64, len(data)))] = rng.choice((0, 1, 127, 128, 255))
        else:
            data += rng.randbytes(rng.randrange(1, 50))
    return bytes(data)


def damaged_text(rng: random.Random, content: str) -> str:
    """The text with lines doubled, swapped, cut, indented by tabs, or with an odd text put in."""
    lines = content.split("\n")
    for _ in range(rng.randrange(1, 4)):
        number = rng.randrange(len(lines))
        accident = rng.randrange(7)
        if accident == 0:
            lines.insert(number, lines[number])
        elif accident == 1:
            lines[number] = "\t" + lines[number]
        elif accident == 2:
            lines[number] = lines[number][: rng.randrange(len(lines[number]) + 1)]
        elif accident == 3:
            place = rng.randrange(len(lines[number]) + 1)
            lines[number] = lines[number][:place] + text(rng) + lines[number][place:]
        elif accident == 4:
            lines[number] = lines[number].replace('"', rng.choice(("'", "“", "”", "")))
        elif accident == 5:
            lines[number] = lines[number].replace("=", rng.choice((":", "==", "", " = ")))
        else:
            other = rng.randrange(len(lines))
            lines[number], lines[other] = lines[other], lines[number]
    return "\n".join(lines)


def encoded(rng: random.Random, content: str) -> bytes:
    """The text as some editor would save it."""
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "shift_jis"))
    ends = rng.choice(("\n", "\n", "\r\n", "\r"))
    content = content.replace("\n", ends)
    try:
        return content.encode(encoding)
    except UnicodeEncodeError:  # an editor would have taken another encoding too; half an emoji it cannot save
        return content.encode("utf-8", "surrogatepass")


def misspelt(rng: random.Random, name: str) -> str:
    """The name with a letter changed, doubled, taken out or in capitals."""
    place = rng.randrange(len(name))
    return rng.choice((
        name[:place] + name[place + 1 :], name[:place] + name[place] * 2 + name[place + 1 :],
        name[:place] + "x" + name[place + 1 :], name.upper(), name + "s", name.replace("_", "-"), name.replace("_", ""),
    ))  # fmt: skip


def some(rng: random.Random, items: Sequence[Any], most: int) -> list[Any]:
    """Up to so many different items."""
    return rng.sample(list(items), rng.randrange(min(most, len(items)) + 1))
