from __future__ import annotations

import pytest

from library.errors import Problems, UserError, nearest, unknown


@pytest.mark.parametrize("name, close", [("network_dm", "network_dim"), ("Network_Dim", "network_dim"), ("xyz", None)])
def test_nearest(name, close):
    assert nearest(name, ["network_dim", "network_alpha"]) == close


def test_unknown_lists_what_is_known_if_nothing_is_close():
    assert str(unknown("key", "zzz", ["b", "a"], "file.toml")) == "unknown key 'zzz' in file.toml; known: a, b"


def raising(error: BaseException):
    def work():
        raise error

    return work


def test_problems_are_collected_from_wrong_input_and_paths_and_nothing_else():
    problems = Problems()
    shut = PermissionError(13, "Permission denied", "shut/a")
    assert problems.of(lambda: 3) == 3 and problems.of(raising(UserError("wrong"))) is None and problems.of(raising(shut)) is None
    assert problems.found[0] == "wrong" and problems.found[1].startswith("shut/a: Permission denied; check")
    with pytest.raises(OSError):
        problems.of(raising(OSError("a bug")))
