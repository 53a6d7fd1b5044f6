"""Runs in two processes, for tests: `launch(folder, runs)` starts them with `accelerate launch` once, for several runs.

Starting processes costs more than small runs do. Each run goes through the main function of train_network.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Outcome:
    """How a run ended on one process."""

    code: int
    error: str
    printed: str
    losses: list[float]
    rates: list[float]


def free_port() -> int:
    """A port that is free, and that no connection gets by chance while the runs go on (as those from 32768 on do)."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = random.randrange(10_000, 30_000)
            probe.bind(("127.0.0.1", port))
            return port


def launch(folder: Path, launcher: list[str], runs: dict[str, list[str]]) -> dict[str, list[Outcome]]:
    """Outcome of each run on process 0 and 1. launcher: words for `accelerate launch`; a run: words for train_network.py.

    The word `--interrupt_at=RANK,STEP` stands for a Ctrl-C on one process.
    """
    (folder / "runs.json").write_text(json.dumps([[name, words, free_port()] for name, words in runs.items()]), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launcher,
        "--main_process_port",
        str(free_port()),
        __file__,
        "runs.json",
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", env=environment, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = [json.loads((folder / f"outcomes{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return {name: [Outcome(**outcomes[name]) for outcomes in written] for name in runs}


def one_process(runs: Path) -> None:
    """What each of the launched processes does."""
    from library.training import program  # before the entry has set up the console, nothing heavy is imported

    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # every run connects anew, on a port of its own
    program.quiet_unless_main()
    folder, rank, outcomes = runs.parent, os.environ["RANK"], {}
    printed = folder / f"printed{rank}.txt"
    with printed.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
    for name, words, port in json.loads(runs.read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(port)
        outcomes[name] = one_run(program.main, words, printed)
    (folder / f"outcomes{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")


def one_run(main, words: list[str], printed: Path) -> dict:
    sys.argv = ["train_network.py", *(word for word in words if not word.startswith("--interrupt_at="))]
    start, code, error = printed.stat().st_size, -1, ""
    made, undo = watch(words)
    try:
        code = main()
    except Exception as problem:
        code = getattr(problem, "exit_code", -1)
        error = str(problem) if code > 0 else traceback.format_exc()
    finally:
        undo()
        sys.stdout.flush()
    return {
        "code": code, "error": error, "printed": printed.read_bytes()[start:].decode(),
        "losses": made[0].losses.values if made else [], "rates": made[0].step.update.schedule.get_last_lr() if made else [],
    }  # fmt: skip


def watch(words: list[str]):
    """Keep the run that is made, and send this process a SIGINT after the step asked for; and a function that undoes this."""
    from accelerate.state import AcceleratorState
    from small_runs import read_tokenizers_once

    from library.training import entry
    from library.training.loop import Listener

    AcceleratorState._reset_state(reset_partial_state=True)
    read_tokenizers_once(setattr)
    asked = next((word.partition("=")[2] for word in words if word.startswith("--interrupt_at=")), "-1,-1")
    rank, step = map(int, asked.split(","))
    made, train = [], entry.train

    class Watch(Listener):
        def begin(self, run):
            made.append(run)

        def after_step(self, progress, report):
            if (int(os.environ["RANK"]), progress.step) == (rank, step):
                os.kill(os.getpid(), signal.SIGINT)

    def undo():
        entry.train = train

    entry.train = lambda options, **words: train(options, [Watch()], **words)
    return made, undo


if __name__ == "__main__":
    one_process(Path(sys.argv[1]).resolve())
