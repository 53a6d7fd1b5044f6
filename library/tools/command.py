"""The parser of the tools' command lines: no abbreviations, errors of one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from library.errors import UserError, unknown
from library.text_values import NEGATIVE, with_plain_minus


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, [], argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"


def path_text(text: str) -> str:
    """For `add_argument(type=...)`: a path, by the name that an existing file has on the disk.

    An empty one is an error: it would be the current folder.
    """
    from library.files import on_disk  # deferred: --help is printed in less time than its imports take

    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path; give one, or leave the option out")
    return on_disk(text)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations. Raises UserError; for an unknown option with the most similar known one."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
        self._negative_number_matcher = NEGATIVE  # argparse's own takes no -5e-1

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        arguments = [with_plain_minus(word) for word in (sys.argv[1:] if args is None else args)]
        for argument in arguments:
            option = argument.split("=", 1)[0]
            if option.startswith("--") and option != "--" and option not in self._option_string_actions:
                raise unknown("option", option, (name for name in self._option_string_actions if name.startswith("--")))
        known, rest = self.parse_known_args(arguments, namespace)
        if rest:
            raise UserError(f"unexpected word '{rest[0]}' on the command line; put values that hold spaces in quotes")
        return known

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))
