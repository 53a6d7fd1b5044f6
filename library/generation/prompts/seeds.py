"""Which seed each image gets."""

from __future__ import annotations

import secrets
from random import Random

DRAWN_SEEDS = 2**31  # seeds drawn here are below this: short enough for a file name


def draw_seed() -> int:
    """A seed at random."""
    return secrets.randbelow(DRAWN_SEEDS)


class Seeds:
    """Seeds handed out from the front.

    None given: random ones. One for a single image: that one. One for several images: numbers that Python's generator draws
    from it, the same for the same seed. Several: these in turn, from the front again after the last.
    """

    def __init__(self, given: tuple[int, ...] | None, images: int | None = None) -> None:
        """images: how many there will be, None if that is open."""
        self._given, self._alone, self._taken = given, images == 1, 0
        self._random = Random(given[0] if given else None)

    def next(self) -> int:
        """The seed of the next image."""
        self._taken += 1
        if self._given is None:
            return draw_seed()
        if len(self._given) > 1 or self._alone:
            return self._given[(self._taken - 1) % len(self._given)]
        return self._random.randint(0, DRAWN_SEEDS - 1)

    def take(self, count: int) -> list[int]:
        """The next `count` seeds."""
        return [self.next() for _ in range(count)]

    @property
    def unused(self) -> tuple[int, ...]:
        """Those of a given list that no image got."""
        return (self._given or ())[self._taken :]
