"""Set everything up beside this file and train a first LoRA, or run the tests.

    python quickstart.py [options]       set up, then train a LoRA on the example images and show what it does
    python quickstart.py test [options]  set up, then run the whole test suite
    python quickstart.py setup           set up only

Set-up makes the folder .venv and installs the pinned packages of requirements.txt into it; it is done once, and again when
requirements.txt changes. pip's own output is kept in .venv/install.log. Further options go to the demo (--steps, --output)
or to pytest (for example -k buckets). Python 3.10 to 3.13; standard library only.
"""

# An old Python, 2.7 included, must be able to read this file and say what is needed: no syntax newer than Python 3.6, no
# print(..., file=...), no "raise ... from None".
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

OLD_PYTHON = (
    "this is Python %d.%d, and 3.10 to 3.13 is needed; get one from https://www.python.org/downloads/ "
    "(or: conda create -n lora python=3.12) and run quickstart.py with it"
)
try:
    from pathlib import Path
except ImportError:
    sys.exit("error: " + OLD_PYTHON % sys.version_info[:2])

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOG = VENV / "install.log"
DONE = VENV / "quickstart.json"  # what is installed; written last
UNFINISHED = VENV / "quickstart-unfinished"  # is there while .venv is made and pip works; left behind by an interruption
LOCK = ROOT / ".venv.lock"  # locked while .venv is changed; the system unlocks it when the process ends, however it ends

OLDEST, NEWEST = (3, 10), (3, 13)
# Measured with a CPU build of torch: 1.7 GB. Estimated for the CUDA build that PyPI has for Linux: 6.5 GB, more while it unpacks.
NEEDED_GB, NEEDED_GB_CUDA = 3, 9
MOST_TEST_WORKERS = 4  # each holds its own torch, about 1 GB
HEARTBEAT_SECONDS = 30

MODES = {"demo": ["requirements.txt"], "setup": ["requirements.txt"], "test": ["requirements.txt", "requirements-test.txt"]}


class Problem(Exception):
    """Something the machine lacks, with the cure, in one line."""

    exit_code = 1


class WrongCommand(Problem):
    """A word on the command line that quickstart.py does not have."""

    exit_code = 2


def main(arguments):
    for stream in (sys.stdout, sys.stderr):  # a path that this console cannot show must not end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if arguments[:1] in (["-h"], ["--help"]):
        say(__doc__.strip())
        return 0
    try:
        mode, arguments = split_mode(arguments)
        check_python()
        set_up(mode)
        return run(mode, arguments)
    except Problem as problem:
        sys.stderr.write("error: %s\n" % problem)
        return problem.exit_code
    except OSError as error:
        sys.stderr.write("error: %s; check the folder's rights and the free disk space\n" % error)
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; run the same command again to go on\n")
        return 130


def say(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def split_mode(arguments):
    """The mode and the arguments for what it runs."""
    if not arguments or arguments[0].startswith("-"):
        return "demo", arguments
    if arguments[0] not in MODES:
        raise WrongCommand("unknown command '%s'; known: %s, or nothing for the demo" % (arguments[0], ", ".join(MODES)))
    if arguments[0] == "setup" and arguments[1:]:
        raise WrongCommand("setup takes no options; '%s' is one too many" % arguments[1])
    return arguments[0], arguments[1:]


def check_python():
    """Raise Problem if this Python cannot have the packages."""
    found = sys.version_info[:2]
    if found < OLDEST:
        raise Problem(OLD_PYTHON % found)
    if sys.maxsize < 2**32:
        raise Problem(
            "this is a 32-bit Python, and PyTorch needs 64 bits; get a 64-bit one from https://www.python.org/downloads/"
        )


def run(mode, arguments):
    """Run the demo or the tests in .venv and return the exit code."""
    environment = child_environment(HF_HUB_OFFLINE="1")
    if mode == "setup":
        return 0
    if mode == "demo":
        return call([str(VENV_PYTHON), str(ROOT / "tools" / "demo.py")] + arguments, environment)
    environment.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg")  # one thread a worker: workers share the cores
    workers = min(MOST_TEST_WORKERS, os.cpu_count() or 1)
    # A file's tests stay on one worker, so that a fixture that trains does so once; tests/e2e, the longest, begins.
    share = ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    return call([str(VENV_PYTHON), "-m", "pytest"] + share + arguments, environment, cwd=str(ROOT))


def child_environment(**more):
    """This environment for Pythons of .venv, which keep what they compile.

    Many container images set PYTHONDONTWRITEBYTECODE; then every process would compile torch and its like anew: 3 s for torch
    alone.
    """
    environment = dict(os.environ, PYTHONUTF8="1", **more)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def call(command, environment, cwd=None):
    """The command's exit code. Ctrl-C is the command's to handle: it may have something to save."""
    process = subprocess.Popen(command, env=environment, cwd=cwd)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


# --- set-up ---


def set_up(mode):
    """Bring .venv to what `mode` needs; nothing but a look at one small file if it is there already."""
    if missing_requirements(mode):
        with Lock():
            if missing_requirements(mode):  # else another process did it while this one waited
                fill_venv(mode)


def missing_requirements(mode):
    """Whether something that `mode` needs is not installed, or not as its requirements file has it now."""
    done = read_done()
    return any(done.get(name) != digest(ROOT / name) for name in MODES[mode])


def fill_venv(mode):
    started = time.time()
    done = read_done()
    check_disk()
    if not usable():
        make_venv()
    UNFINISHED.touch()
    if DONE.exists():
        DONE.unlink()
    install(MODES[mode][-1])
    compile_imports()
    wanted = {name: digest(ROOT / name) for name in MODES[mode]}
    kept = {name: value for name, value in done.items() if name not in wanted and value == current_digest(name)}
    write_done(dict(kept, **wanted))
    UNFINISHED.unlink()
    say("Set up in %d s. pip's output: %s\n" % (time.time() - started, LOG))


class Lock:
    """Holds LOCK, so that one process at a time changes .venv; waits for another one's end.

    pip inherits the lock where the system can hand it on: when quickstart.py alone is killed, the next one waits for its pip.
    """

    def __enter__(self):
        self.file = open(str(LOCK), "a")
        waits = False
        while not try_lock(self.file):
            if not waits:
                say("Another quickstart.py is setting up %s; waiting for it" % VENV)
                waits = True
            time.sleep(1)
        if os.name != "nt":
            os.set_inheritable(self.file.fileno(), True)

    def __exit__(self, *_):
        self.file.close()


def try_lock(file):
    """Whether this process now holds the lock; also true on a file system that has no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def current_digest(name):
    """The digest of a requirements file as it is now; None for anything else in the record."""
    return digest(ROOT / name) if name in MODES["test"] else None


def read_done():
    """What was installed into this .venv at this place; empty if nothing was, or not to the end."""
    try:
        done = json.loads(DONE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    # A moved .venv still starts, but its `accelerate` and `activate` name the old place.
    whole = isinstance(done, dict) and done.pop("place", None) == str(VENV) and VENV_PYTHON.exists()
    return done if whole else {}


def write_done(done):
    temporary = DONE.with_suffix(".new")
    temporary.write_text(json.dumps(dict(done, place=str(VENV))), encoding="utf-8")
    os.replace(str(temporary), str(DONE))


def check_disk():
    free = shutil.disk_usage(str(ROOT)).free / 1e9
    if free < NEEDED_GB:
        raise Problem("%.1f GB are free on the disk of %s, and about %d GB are needed; free some space" % (free, ROOT, NEEDED_GB))
    if sys.platform == "linux" and free < NEEDED_GB_CUDA:
        say(
            "Note: %.1f GB are free on this disk; PyTorch with CUDA wants about %d GB. "
            'README.md, "Requirements", says how to put the small CPU build there.' % (free, NEEDED_GB_CUDA)
        )


def usable():
    """Whether .venv can be added to: whole, at its place, and of a Python that has the packages."""
    if UNFINISHED.exists() or not VENV_PYTHON.exists():
        return False
    if DONE.exists() and not read_done():
        return False
    code = "import sys; sys.exit(not %r <= sys.version_info[:2] <= %r)" % (OLDEST, NEWEST)
    # The help of pip install imports all that an installation uses: a pip of which files are missing fails here.
    for words in (["-c", code], ["-m", "pip", "install", "--help"]):
        if subprocess.call([str(VENV_PYTHON)] + words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            return False
    return True


def make_venv():
    import importlib.util

    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):  # Debian and Ubuntu ship Python without
        raise Problem(
            "this Python has no venv; on Debian and Ubuntu run: sudo apt install python%d.%d-venv" % sys.version_info[:2]
        )
    if Path(sys.prefix).resolve() == VENV.resolve():
        raise Problem(
            "%s must be made anew and cannot be while its own Python runs; run quickstart.py with the system's Python" % VENV
        )
    say("Making %s with Python %s" % (VENV, sys.version.split()[0]))
    failure = None
    try:
        import venv

        clear_venv()
        venv.create(str(VENV), with_pip=True, symlinks=os.name != "nt")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        failure = error
    if failure:
        raise Problem("%s could not be made (%s); check that the folder may be written to and is not in use" % (VENV, failure))


def clear_venv():
    """Empty .venv but for the mark that it is unfinished, which is put there first: whenever this is killed, it starts afresh."""
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(str(path))
        elif path != UNFINISHED:
            path.unlink()


def install(requirements):
    """pip install into .venv, with a plain line for each big step."""
    say("Installing the packages of %s; the first time this downloads up to 3 GB" % requirements)
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off",
               "--no-compile",  # most of the packages' files are never imported; `compile_imports` does the others
               "-r", str(ROOT / requirements)]  # fmt: skip
    environment = child_environment(PIP_USER="0")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, close_fds=False)
    progress = Progress()
    try:
        with open(str(LOG), "wb") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                progress.see(line.decode("utf-8", "replace"))
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        progress.stop()
    if code:
        raise Problem("%s (pip's output: %s)" % (cause_of_failure(LOG.read_text(encoding="utf-8", errors="replace")), LOG))


def compile_imports():
    """Import once what every training imports, so that no later process has to compile it.

    What fails here fails again in the run itself, with a better message.
    """
    say("  compiling")
    program = "import library.training.entry; from library.imports import import_model_libraries; import_model_libraries()"
    subprocess.call(
        [str(VENV_PYTHON), "-c", program],
        cwd=str(ROOT),
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


class Progress:
    """Turns pip's output into a few lines, and shows now and then that a long step is still at work."""

    def __init__(self):
        self.started = time.time()
        self.doing = "looking up the packages"
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()

    def see(self, line):
        big = re.search(r"Downloading (?:\S*/)?([^/\s]+?)-(\d[^-\s]*)-\S+ \((\d[\d.,]*) (MB|GB)\)", line)
        if big and (big.group(4) == "GB" or float(big.group(3).replace(",", "")) >= 10):
            self.tell("downloading %s %s (%s %s)" % big.groups())
        elif line.startswith("Installing collected packages"):
            self.tell("unpacking %d packages" % (line.count(",") + 1))
        elif line.startswith("Collecting "):
            self.doing = line.strip().lower().split(" (")[0]

    def tell(self, doing):
        self.doing = doing
        say("  %s" % doing)

    def beat(self):
        while not self.stopped.wait(HEARTBEAT_SECONDS):
            say("  ... %d s, %s" % (time.time() - self.started, self.doing))

    def stop(self):
        self.stopped.set()
        self.thread.join()


NETWORK_SIGNS = ("NewConnectionError", "NameResolutionError", "Failed to establish a new connection", "getaddrinfo failed",
                 "Network is unreachable", "ConnectTimeoutError", "ReadTimeoutError", "Read timed out", "ProxyError",
                 "Connection broken", "ConnectionResetError", "RemoteDisconnected", "Max retries exceeded")  # fmt: skip


def cause_of_failure(log):
    """One line with cause and cure, from pip's output."""
    if "No space left on device" in log or "[WinError 112]" in log:
        free, free_temporary = (shutil.disk_usage(str(place)).free / 1e9 for place in (ROOT, tempfile.gettempdir()))
        return (
            "the disk is full: %.1f GB free for %s, %.1f GB in %s where pip unpacks; about %d GB are needed, %d with CUDA; "
            "free some space and run this again" % (free, VENV, free_temporary, tempfile.gettempdir(), NEEDED_GB, NEEDED_GB_CUDA)
        )
    if "CERTIFICATE_VERIFY_FAILED" in log:
        return (
            "the package index's certificate is not trusted here; point PIP_CERT to your network's certificate file "
            "and run this again"
        )
    if any(sign in log for sign in NETWORK_SIGNS):
        return (
            "the packages could not be downloaded: no network, or the package index cannot be reached; check the connection "
            "(behind a proxy set HTTPS_PROXY, without network set PIP_FIND_LINKS to a folder of wheels) and run this again"
        )
    missing = re.search(r"No matching distribution found for (\S+)", log)
    places = re.findall(r"^Looking in (?:indexes|links): (.+)$", log, re.MULTILINE)
    if missing and places and sys.version_info[:2] <= NEWEST:
        return (
            "no %s for Python %d.%d on this system is found in %s, where pip looks here; add it there, "
            "or unset PIP_INDEX_URL, PIP_NO_INDEX and PIP_FIND_LINKS (and in pip's configuration), and run this again"
            % ((missing.group(1),) + sys.version_info[:2] + (" and ".join(place.strip() for place in places),))
        )
    if missing:
        return (
            "there is no build of %s for Python %d.%d on this system; there are builds for Python 3.10 to 3.13 "
            "on 64-bit Linux and Windows and on Macs with Apple silicon" % ((missing.group(1),) + sys.version_info[:2])
        )
    if "Permission denied" in log or "[WinError 5]" in log:
        return "%s may not be written to; close what uses it, check its rights and run this again" % VENV
    if "Traceback (most recent call last)" in log:
        return "pip itself fails, perhaps because files of it are missing; delete %s and run this again" % VENV
    errors = [line.strip() for line in log.splitlines() if line.lower().startswith("error:")]
    return "pip failed: %s" % (errors[-1][len("error:") :].strip() if errors else "see its output")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
