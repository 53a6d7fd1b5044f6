"""Kill a training run at random moments, again and again, and see whether it still ends as if nothing had happened.

    python benchmarks/kill_resume.py --kills 500 --out benchmarks/results/kill_resume.json

A run of the smallest model saves its state after every step. A child process trains; SIGKILL ends it at a random time, or at a
random file operation, or in the middle of writing a file of a state. The next child goes on with --resume from whatever lies in
the folder. After every kill the newest whole state must be at least the last one whose saving had returned. When the last step is
done, the file and everything in the state must be those of a run that was never killed, bit for bit. Then the next round begins.

Everything is imported, and the model loaded, once: the children are forked. So a kill costs what it destroys and no more. POSIX
only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "library" / "training")]
os.environ["OMP_NUM_THREADS"] = "1"  # threads would not survive the fork

import torch  # noqa: E402
from small_runs import AfterStep, image_folder, tensors_of, use_two_blocks, words_of_a_run  # noqa: E402
from tqdm import tqdm  # noqa: E402

from library.errors import UserError  # noqa: E402
from library.training.checks.preflight import preflight  # noqa: E402
from library.training.machine import Machine  # noqa: E402
from library.training.options import parse_options  # noqa: E402
from library.training.run_state import state as state_module  # noqa: E402
from library.training.run_state.resume import begin_at, progress_of  # noqa: E402
from library.training.run_state.state import find_state, read_state  # noqa: E402
from library.training.setup import Run, prepare  # noqa: E402

STEPS = 16
WORDS = (
    "--network_train_unet_only", "--cache_latents", f"--max_train_steps={STEPS}", "--lr_scheduler=cosine",
    "--network_dropout=0.1", "--caption_dropout_rate=0.3", "--ema_decay=0.9", "--validation_split=0.2",
    "--save_state", "--save_every_n_steps=1", "--save_last_n_steps_state=2", "--save_last_n_steps=2",
)  # fmt: skip


class Child:
    """What a forked process does: go on from the newest whole state in a folder, and perhaps kill itself at a file operation."""

    def __init__(self, run: Run, folder: Path, log: int) -> None:
        self.run, self.folder, self.log = run, folder, log

    def train(self, fatal_operation: int | None, fatal_write: int | None) -> None:
        """Ends the process: exit code 0 when the last step is done. The operation or write of that number is the last one."""
        try:
            self._go_on()
            self._watch(fatal_operation, fatal_write)
            os.write(self.log, b"begin\n")
            self.run.train()
            os._exit(0)
        except BaseException as error:
            os.write(self.log, f"error {error!r}\n".encode())
            os._exit(1)

    def _go_on(self) -> None:
        self.run.files.folder = self.folder
        try:
            state = read_state(find_state(self.folder, "mine"))
        except UserError:
            return  # killed before the first state
        begin_at(self.run, progress_of(state), state)

    def _watch(self, fatal_operation: int | None, fatal_write: int | None) -> None:
        """Report saved states, and count file operations towards the fatal one."""
        write, count = state_module.write_file, Counter()
        report = AfterStep(lambda run: os.write(self.log, f"saved {run.loop.progress.step}\n".encode()))
        report.begin(self.run)
        self.run.loop.listeners = [*self.run.loop.listeners, report]  # the last one: by then the state of the step is saved

        def writing(path: Path, content: bytes) -> list[int]:
            count["write"] += 1
            if count["write"] == fatal_write:
                path.write_bytes(content[: random.randrange(len(content))])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, content)

        def audit(event: str, arguments: tuple) -> None:
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree") and str(self.folder) in str(
                arguments[0]
            ):
                count["operation"] += 1
                if count["operation"] == fatal_operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        state_module.write_file = writing
        if fatal_operation:
            sys.addaudithook(audit)


def fork(run: Run, folder: Path, log: Path, **fatal: int | None) -> int:
    """Start a child; gives its process number."""
    sys.stdout.flush()
    number = os.fork()
    if number == 0:
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own lock is shared with all children, and stays taken where one dies holding it
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        Child(run, folder, os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)).train(fatal.get("operation"), fatal.get("write"))
    return number


def wait_for_begin(log: Path, number: int) -> None:
    """Until the child trains, so that the moment of the kill falls into training."""
    while b"begin" not in (log.read_bytes() if log.exists() else b""):
        time.sleep(0.002)
        if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return


def kill_once(run: Run, folder: Path, span: float, how: str) -> tuple[str, int]:
    """Train in a child until it is killed or done: ("killed" or "done", the last step whose state it had saved)."""
    log = folder.parent / "log"
    log.unlink(missing_ok=True)
    fatal = {"operation": {"operation": random.randint(1, 60)}, "write": {"write": random.randint(1, 25)}}.get(how, {})
    number = fork(run, folder, log, **fatal)
    if how == "time":
        wait_for_begin(log, number)
        time.sleep(random.uniform(0, span))
        os.kill(number, signal.SIGKILL)
    _, status = os.waitpid(number, 0)
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    if any(line.startswith("error") for line in lines):
        raise SystemExit(f"the run failed: {lines[-1]}")
    saved = [int(line.split()[1]) for line in lines if line.startswith("saved")]
    return "killed" if os.WIFSIGNALED(status) else "done", max(saved, default=0)


def whole_step(folder: Path) -> int:
    """The step of the newest whole state, 0 if there is none."""
    try:
        return read_state(find_state(folder, "mine")).record["step"]
    except UserError:
        return 0


def content(folder: Path) -> dict:
    """What must be equal at the end: the file, the best one, and all of the state but times."""
    state = read_state(folder / "mine-state")
    record = {key: state.record[key] for key in ("step", "next", "losses", "validations", "average_updates")}
    return {
        "file": tensors_of(folder / "mine.safetensors"), "best": tensors_of(folder / "mine-best.safetensors"),
        "tensors": state.tensors, "objects": {name: state.objects[name] for name in ("optimizer", "schedule")}, "record": record,
    }  # fmt: skip


def same(a, b) -> bool:
    """Whether two nests of dictionaries, lists, numbers and tensors are the same in every bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def prepared(base: Path) -> Run:
    """A run that is ready for its first step, with everything that the children share."""
    use_two_blocks(setattr)
    options = parse_options(words_of_a_run(image_folder(base / "images", 6), base / "whole", *WORDS))
    machine = Machine.of(options.training)
    run = prepare(preflight(options, machine.device, 1), machine)
    run.metadata.at(0, 0)  # waits for its thread, which would not survive the fork
    return run


def experiment(base: Path, kills: int) -> dict:
    """Kill that often; raises SystemExit if a round did not end as it should."""
    run = prepared(base)
    started = time.perf_counter()
    os.waitpid(fork(run, base / "whole", base / "log"), 0)
    step_time = (time.perf_counter() - started) / STEPS
    expected = content(base / "whole")
    counts, rounds, halves, lost = Counter(), 0, 0, []
    while sum(counts.values()) < kills:
        folder, reached = base / "killed", 0
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        outcome = "killed"
        while outcome == "killed":
            left = kills - sum(counts.values())
            how = random.choice(("time", "operation", "write")) if left > 0 else "never"
            outcome, saved = kill_once(run, folder, 4 * step_time, how)
            if outcome == "killed":
                counts[how] += 1
                halves += any(folder.glob(".mine*-state.*"))
                found = whole_step(folder)
                if found < max(reached, saved):
                    raise SystemExit(
                        f"after a kill by {how} the newest whole state is that of step {found}, but {saved} was saved"
                    )
                lost.append(found - max(reached, saved))
                reached = found
        if not same(content(folder), expected):
            raise SystemExit(f"round {rounds + 1} did not end as a run that was never killed")
        left_over = sorted(path.name for path in folder.iterdir() if path.name.startswith(".mine") and path.is_dir())
        if left_over:
            raise SystemExit(f"half-written states are left: {left_over}")
        rounds += 1
    return {
        "kills": dict(counts), "kills_in_all": sum(counts.values()), "kills_that_left_a_half_written_state": halves,
        "whole_though_saving_had_not_returned": sum(extra > 0 for extra in lost), "rounds_that_ended_bit_for_bit": rounds,
        "steps_a_round": STEPS, "seconds_a_step_with_its_state": round(step_time, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as base:
        result = experiment(Path(base), options.kills)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
