"""Run the test of each option of train_network.py with that option taken away, and say which tests do not notice.

    python benchmarks/options_do_something.py [option ...]

A test says by `@pytest.mark.option("its_name")` which option it notices. An option is taken away where options are made:
given or not, it has its default. A test that passes all the same would pass if the option did nothing. Takes some minutes.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "library" / "training")]

from library import command_line  # noqa: E402


class Without:
    """A pytest plugin that takes one option away."""

    def __init__(self, option: str) -> None:
        self.option = option

    @pytest.fixture(autouse=True)
    def take_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        build, init = command_line.build, command_line.OptionGroup.__init__

        def build_without(options_class, values):
            return build(options_class, {name: value for name, value in values.items() if name != self.option})

        def init_without(group, **values):
            values.pop(self.option, None)
            init(group, **values)

        monkeypatch.setattr(command_line, "build", build_without)
        monkeypatch.setattr(command_line.OptionGroup, "__init__", init_without)


def main(wanted: list[str]) -> int:
    """Returns the number of options whose test does not notice."""
    from option_marks import marked_options
    from test_options_walk import OF_DATASETS

    of_datasets = ("library/training/test_options_walk.py", "test_dataset_options_reach_the_datasets")
    unnoticed = []
    for option, (file, test) in {**marked_options(), **dict.fromkeys(OF_DATASETS, of_datasets)}.items():
        if wanted and option not in wanted:
            continue
        parameter = f"[{option}]" if test == "test_dataset_options_reach_the_datasets" else ""
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            words = ["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), f"{ROOT / 'tests' / file}::{test}{parameter}"]
            code = pytest.main(words, plugins=[Without(option)])
        noticed = code == pytest.ExitCode.TESTS_FAILED
        print(f"{option:34} {'noticed' if noticed else f'NOT NOTICED ({code!r})'}  {file}::{test}", flush=True)
        unnoticed += [] if noticed else [option]
    print(f"{len(unnoticed)} not noticed: {', '.join(unnoticed) or 'none'}")
    return len(unnoticed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
