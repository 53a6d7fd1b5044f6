"""What this installation can do: versions, devices, what works, and what to install.

    python tools/doctor.py               a report in seconds; nothing is downloaded, and nothing is changed
    python tools/doctor.py --self_test   short trainings besides, in every way that this machine could use: under 5 minutes

Exit code 0, or 1 if training cannot run here.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file may be started from anywhere

from library.doctor.installation import Finding, python_version, sections  # noqa: E402


def main(words: Sequence[str] | None = None) -> int:
    """Print the report, and the self test's table."""
    from library.console import silence_needless_advice
    from library.tools.command import Parser

    parser = Parser("What this installation can do: versions, devices, what works, and what to install.")
    parser.add_argument("--self_test", action="store_true", help="train a few steps in every way that this machine could use")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(words)
    silence_needless_advice()

    report: dict[str, list[Finding]] = {}
    for heading, findings in sections():
        report[heading] = findings
        if not args.json:
            print(f"\n{heading}", *findings, sep="\n", flush=True)
    bad = [finding.name for findings in report.values() for finding in findings if finding.state == "bad"]
    rows = None
    if args.self_test and not bad:
        from library.doctor.self_test import self_test, table
        from library.doctor.trials import this_machine, trials

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a trial does not go on without us
        reasons = {finding.name: finding.text.split(";")[0] for finding in report["What works"] if finding.state != "ok"}
        rows = self_test(trials(this_machine(reasons)))
        bad = [row.name for row in rows[:1] if row.state == "fails"]
        if not args.json:
            print(f"\n{table(rows)}")
    if args.json:
        print(json.dumps(as_data(report, bad, rows), indent=2))
    elif bad:
        print(f"\ntraining cannot run here: {', '.join(bad)}; see above, or run: python quickstart.py")
    else:
        print("\ntraining can run here")
    return 1 if bad else 0


def as_data(report: dict[str, list[Finding]], bad: list[str], rows: list | None) -> dict:
    """The report as data for JSON; `self_test` is missing where it did not run."""
    data = {
        "training_can_run": not bad,
        "cannot_run_because_of": bad,
        "findings": [{"section": heading, **asdict(finding)} for heading, found in report.items() for finding in found],
    }
    return data if rows is None else {**data, "self_test": [asdict(row) for row in rows]}


if __name__ == "__main__":
    if python_version().state == "bad":
        sys.exit(str(python_version()))  # what is imported next cannot be read by it
    from library.entry import run_entry

    run_entry(main)
