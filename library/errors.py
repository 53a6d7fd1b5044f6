"""Errors that a user can fix: one line with the cause and the cure, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class UserError(Exception):
    """Wrong input. The message is one line: what is wrong, where (file, key or option), and what to do."""

    exit_code = 2


class UserErrors(UserError):
    """Several errors at once, one line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def problem_of_path(error: OSError) -> UserError | None:
    """The error for a path that the system rejects (rights, a long name, a link to itself), or for a full disk.

    None for any other error without a path.
    """
    if error.filename is None:
        is_full = errno.errorcode.get(error.errno or 0) in ("ENOSPC", "EDQUOT", "EFBIG")
        return UserError(f"a file cannot be written: {error.strerror}; make room on its disk") if is_full else None
    return UserError(f"{error.filename}: {error.strerror or error}; check the path and the rights of its folders")


class Problems:
    """Collects errors, so that all are reported at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def of(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The result of `work`; None if it raises UserError, or OSError for a path. The message is kept."""
        try:
            return work(*args, **kwargs)
        except UserError as error:
            self.found += getattr(error, "problems", [str(error)])
        except OSError as error:
            problem = problem_of_path(error)
            if problem is None:
                raise
            self.found.append(str(problem))
        return None

    def results(self, found: Iterable[T | None]) -> list[T]:
        """The results of several calls of `of`. Raises UserErrors if any problem was found."""
        results = [result for result in found if result is not None]
        self.raise_found()
        return results

    def raise_found(self) -> None:
        """Raises UserErrors with all problems, each once, if any was found."""
        if self.found:
            raise UserErrors(list(dict.fromkeys(self.found)))


class RunFailed(UserError):
    """The input was right, but the run cannot continue (a loss of NaN, say)."""

    exit_code = 1


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most similar to `name`, or None. cutoff: the least similarity, from 0 to 1."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    if not matches:
        by_lower = {k.lower(): k for k in known}
        matches = [by_lower[m] for m in difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)]
    return matches[0] if matches else None


def listed(items: Sequence[str], limit: int = 10, separator: str = ", ") -> str:
    """At most `limit` items, and the number of the others.

    >>> listed(["a", "b", "c"], 2), listed(["a", "b", "c"], 2, "; ")
    ('a, b and 1 more', 'a; b; and 1 more')
    """
    more = f"{separator.rstrip(', ')} and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number and what it counts; plural: of nouns that take more than an s.

    >>> counted(1, "image"), counted(2000, "image"), counted(2, "batch", "batches")
    ('1 image', '2,000 images', '2 batches')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def unknown(what: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """The error for an unknown name, with the most similar known one.

    >>> str(unknown("network_args key", "conv_dm", ["conv_dim"]))
    "unknown network_args key 'conv_dm'; did you mean 'conv_dim'?"
    """
    known = sorted(known)
    close = nearest(name, known)
    cure = f"did you mean '{close}'?" if close else f"known: {', '.join(known)}"
    return UserError(f"unknown {what} '{name}'{f' in {where}' if where else ''}; {cure}")


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error in one line of at most `limit` characters; without a message, its type."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
