"""quickstart.py and the requirements: set-up is done once, repaired after an interruption; errors are one line with the cure."""

from __future__ import annotations

import ast
import itertools
import os
import runpy
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import quickstart

make_venv_for_real = quickstart.make_venv

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "quickstart.py").read_text(encoding="utf-8")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = ("linux", "win32", "darwin")
IMPORT_TO_PACKAGE = {"cv2": "opencv-python-headless", "PIL": "pillow", "marionette_driver": "marionette-driver"}
# huggingface_hub comes with diffusers and transformers, whose pins choose its version for each Python.
# packaging comes with transformers and accelerate; the doctor does without it.
OPTIONAL = {
    "huggingface_hub",
    "packaging",
    "resvg_py",
    "xformers",
    "wandb",
    "lion_pytorch",
    "dadaptation",
    "prodigyopt",
    "schedulefree",
    "lycoris",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own, with spaces and non-ASCII in its path, in which 'installing' only writes down what it was asked."""
    root = tmp_path / "mein Projekt ü 日本"
    root.mkdir()
    for name in quickstart.MODES["test"]:
        (root / name).write_text(f"# {name}\n", encoding="utf-8")
    venv = root / ".venv"
    for name, value in {
        "ROOT": root, "VENV": venv, "VENV_PYTHON": venv / "python", "LOG": venv / "install.log", "DONE": venv / "quickstart.json",
        "UNFINISHED": venv / "quickstart-unfinished", "LOCK": root / ".venv.lock",
    }.items():  # fmt: skip
        monkeypatch.setattr(quickstart, name, value)
    calls: list[str] = []

    def make_venv():
        calls.append("venv")
        venv.mkdir(exist_ok=True)
        for old in venv.iterdir():
            old.unlink()
        (venv / "python").touch()

    monkeypatch.setattr(quickstart, "make_venv", make_venv)
    monkeypatch.setattr(quickstart, "install", calls.append)
    monkeypatch.setattr(quickstart, "check_disk", lambda: None)
    monkeypatch.setattr(quickstart.subprocess, "call", lambda *_, **__: 0)  # .venv's Python and pip work
    return root, calls


def test_set_up_is_done_once(project):
    _, calls = project
    quickstart.set_up("demo")
    assert calls == ["venv", "requirements.txt"]
    quickstart.set_up("demo")
    assert len(calls) == 2


def test_tests_add_to_what_the_demo_installed(project):
    _, calls = project
    quickstart.set_up("demo")
    quickstart.set_up("test")
    quickstart.set_up("demo")
    quickstart.set_up("test")
    assert calls == ["venv", "requirements.txt", "requirements-test.txt"]


def test_changed_requirements_are_installed_again(project):
    root, calls = project
    quickstart.set_up("test")
    (root / "requirements.txt").write_text("torch==9\n", encoding="utf-8")
    quickstart.set_up("demo")
    assert calls == ["venv", "requirements-test.txt", "requirements.txt"]
    quickstart.set_up("test")
    assert len(calls) == 3


def test_interrupted_install_starts_afresh(project, monkeypatch):
    _, calls = project

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quickstart, "install", interrupted)
        quickstart.set_up("demo")
    quickstart.set_up("demo")
    assert calls == ["venv", "venv", "requirements.txt"]


def test_moved_project_gets_a_new_venv(project, monkeypatch):
    _, calls = project
    quickstart.set_up("demo")
    quickstart.DONE.write_text(quickstart.DONE.read_text(encoding="utf-8").replace(".venv", "elsewhere"), encoding="utf-8")
    quickstart.set_up("demo")
    assert calls == ["venv", "requirements.txt"] * 2


def test_venv_made_by_hand_is_kept(project):
    _, calls = project
    quickstart.VENV.mkdir()
    quickstart.VENV_PYTHON.touch()
    quickstart.set_up("demo")
    assert calls == ["requirements.txt"]


def test_set_up_killed_while_the_venv_is_made_starts_afresh(project, monkeypatch):
    _, calls = project
    quickstart.VENV.mkdir()
    quickstart.VENV_PYTHON.touch()
    quickstart.DONE.write_text("{}", encoding="utf-8")

    def killed(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(quickstart, "make_venv", make_venv_for_real)
        patch.setattr("venv.create", killed)
        quickstart.set_up("demo")
    assert not quickstart.VENV_PYTHON.exists() and not quickstart.usable()
    quickstart.VENV_PYTHON.touch()  # venv made it, and was killed while pip was put in
    assert not quickstart.usable()
    quickstart.set_up("demo")
    assert calls == ["venv", "requirements.txt"]


def test_the_mark_of_an_unfinished_venv_is_there_before_anything_is_deleted(project, monkeypatch):
    quickstart.VENV.mkdir()
    (quickstart.VENV / "lib").mkdir()

    def killed(_):
        raise SystemExit

    monkeypatch.setattr(quickstart.shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        quickstart.clear_venv()
    assert quickstart.UNFINISHED.exists()


def test_a_venv_whose_pip_lacks_files_is_made_anew(project, monkeypatch):
    _, calls = project
    quickstart.VENV.mkdir()
    quickstart.VENV_PYTHON.touch()
    monkeypatch.setattr(quickstart.subprocess, "call", lambda command, **_: int("pip" in command))
    quickstart.set_up("demo")
    assert calls == ["venv", "requirements.txt"]


def test_a_second_set_up_waits_for_the_first_and_then_finds_all_done(project, monkeypatch, capsys):
    _, calls = project
    second = threading.Thread(target=quickstart.set_up, args=("demo",))

    def install(requirements):
        calls.append(requirements)
        second.start()
        while "waiting for it" not in (shown := capsys.readouterr().out):
            assert second.is_alive(), shown
            time.sleep(0.01)

    monkeypatch.setattr(quickstart, "install", install)
    quickstart.set_up("demo")
    second.join()
    assert calls == ["venv", "requirements.txt"]


@pytest.mark.skipif(os.name == "nt", reason="a lock cannot be handed on there")
def test_pip_keeps_the_lock_when_quickstart_alone_is_killed(project):
    quickstart.LOCK.parent.mkdir(exist_ok=True)
    with quickstart.Lock():
        pip = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with open(quickstart.LOCK, "a") as file:
        assert not quickstart.try_lock(file)
        pip.communicate()
        assert quickstart.try_lock(file)


@pytest.mark.parametrize(
    ("log", "cause", "cure"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
         "disk is full", "free some space"),
        ("WARNING: Retrying: NewConnectionError('...: Temporary failure in name resolution')\n"
         "ERROR: No matching distribution found for torch==2.13.0", "no network", "PIP_FIND_LINKS"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] ...", "certificate", "PIP_CERT"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no build of torch==2.13.0", "Python 3.10 to 3.13"),
        ("Looking in links: /wheels\nERROR: No matching distribution found for torch==2.13.0",
         "found in /wheels", "PIP_FIND_LINKS"),
        ("Looking in indexes: https://m.org/simple\nERROR: No matching distribution found for a==1",
         "found in https://m.org/simple", "add it"),
        ("Traceback (most recent call last):\nModuleNotFoundError: No module named 'pip._vendor.urllib3'",
         "pip itself", "delete"),
        ("ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: 'x'",
         "may not be written", "rights"),
        ("ERROR: something else\n", "something else", "pip failed"),
    ],
)  # fmt: skip
def test_failed_install_names_cause_and_cure_in_one_line(log, cause, cure):
    line = quickstart.cause_of_failure(log)
    assert cause in line and cure in line and "\n" not in line


def test_a_full_disk_is_noticed_before_the_install(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(quickstart.shutil, "disk_usage", lambda _: usage(1, 1, 1e9))
    with pytest.raises(quickstart.Problem, match="1.0 GB are free .* free some space"):
        quickstart.check_disk()


def test_an_old_python_prints_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(quickstart.sys, "version_info", (3, 8, 18))
    assert quickstart.main([]) == 1
    message = capsys.readouterr().err
    assert "Python 3.8" in message and "3.10" in message and "python.org" in message and message.count("\n") == 1


def test_unknown_command_is_refused_before_any_set_up(capsys):
    assert quickstart.main(["tset"]) == 2
    assert "unknown command 'tset'" in capsys.readouterr().err
    assert quickstart.main(["setup", "--steps", "5"]) == 2
    assert "'--steps'" in capsys.readouterr().err


def test_help_needs_no_set_up_and_works_from_anywhere(tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "quickstart.py"), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "quickstart.py test" in result.stdout
    assert not list(tmp_path.iterdir())


def test_exit_code_and_arguments_are_passed_on(monkeypatch):
    called = []
    monkeypatch.setattr(quickstart, "set_up", lambda mode: None)
    monkeypatch.setattr(quickstart, "call", lambda command, *_, **__: called.append(command) or 7)
    assert quickstart.main(["test", "-k", "buckets"]) == 7
    assert called[0][-2:] == ["-k", "buckets"] and "pytest" in called[0]
    assert quickstart.main(["--steps", "5"]) == 7
    assert called[1][-2:] == ["--steps", "5"] and called[1][1].endswith("demo.py")


def test_children_keep_what_they_compile(monkeypatch):
    """Else every process of a container, where this is often set, compiles torch anew."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    environments = []
    monkeypatch.setattr(quickstart, "set_up", lambda mode: None)
    monkeypatch.setattr(quickstart, "call", lambda command, environment, **_: environments.append(environment) or 0)
    quickstart.main(["test"])
    quickstart.main([])
    assert len(environments) == 2 and not any("PYTHONDONTWRITEBYTECODE" in environment for environment in environments)


def test_set_up_compiles_what_a_training_imports(project, monkeypatch):
    programs = []
    monkeypatch.setattr(quickstart.subprocess, "call", lambda command, **_: programs.append(command[-1]) or 0)
    quickstart.set_up("demo")
    compiled = [program for program in programs if "library.training.entry" in program]
    assert len(compiled) == 1
    code = f"{compiled[0]}; import sys; print('diffusers' in sys.modules and 'library.training.setup' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "True"


def test_quickstart_is_readable_by_old_pythons_and_needs_the_standard_library_only():
    tree = ast.parse(SOURCE, feature_version=(3, 7))
    assert imported_modules(tree) <= sys.stdlib_module_names
    assert not any(isinstance(node, (ast.JoinedStr, ast.NamedExpr, ast.AnnAssign)) for node in ast.walk(tree))


def test_python_2_can_read_quickstart_far_enough_to_say_what_is_needed(monkeypatch):
    """What Python 3.6 has and Python 2 cannot parse: print with keywords, `raise ... from`, nonlocal, bare `*`, annotations."""
    tree = ast.parse(SOURCE)
    assert SOURCE.isascii()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"
        assert not (isinstance(node, ast.Raise) and node.cause), f"line {node.lineno}"
        assert not isinstance(node, (ast.Nonlocal, ast.Starred, ast.AsyncFunctionDef, ast.YieldFrom)), f"line {node.lineno}"
        if isinstance(node, ast.FunctionDef):
            assert not node.args.kwonlyargs and not node.returns, f"line {node.lineno}"
    monkeypatch.setitem(sys.modules, "pathlib", None)  # as where it does not exist
    with pytest.raises(SystemExit, match="is needed; get one from"):
        runpy.run_path(str(ROOT / "quickstart.py"))


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
def test_ci_runs_the_test_command_and_passes_its_failure_on(tmp_path):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text(encoding="utf-8"), encoding="utf-8", newline="\n")
    (tmp_path / "quickstart.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)\n", encoding="utf-8")
    result = subprocess.run(["bash", str(tmp_path / ".ci" / "run")], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (3, "['test']")


@pytest.mark.parametrize("content", ["import pytest\n@pytest.mark.skip\ndef test_a(): pass\n", "x = 1\n"])
def test_a_run_in_which_no_test_passed_fails(tmp_path, content):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_it.py").write_text(content, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0


# --- requirements ---


def requirements(*names: str) -> list[Requirement]:
    lines = itertools.chain.from_iterable((ROOT / name).read_text(encoding="utf-8").splitlines() for name in names)
    lines = (line.partition("#")[0].strip() for line in lines)
    return [Requirement(line) for line in lines if line and not line.startswith("-r ")]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-test.txt", "requirements-dev.txt", "requirements-extras.txt"])
def test_every_requirement_is_an_exact_pin(name):
    for requirement in requirements(name):
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_python_gets_each_package_once(python, platform):
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": platform}
    everything = requirements("requirements.txt", "requirements-test.txt", "requirements-dev.txt")
    wanted = [r.name for r in everything if r.marker is None or r.marker.evaluate(environment)]
    # Its requirement psutil==5.9.8 on macOS contradicts ours; on 3.13 it lacks telnetlib.
    without_marionette = python == "3.13" or platform == "darwin"
    left_out = ({"tomli"} if python != "3.10" else set()) | ({"marionette-driver"} if without_marionette else set())
    assert sorted(wanted) == sorted({r.name for r in everything} - left_out)


def test_what_the_tree_imports_is_required():
    required = {requirement.name for requirement in requirements("requirements.txt")}
    for_tests = required | {requirement.name for requirement in requirements("requirements-test.txt")}
    own = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    missing = []
    for path in python_files():
        allowed = for_tests if path.relative_to(ROOT).parts[0] in ("tests", "benchmarks") else required
        local = own | {
            sibling.stem
            for folder in (path.parent, ROOT / "tests", ROOT / "tests/library/training", ROOT / "tests/library/generation")
            for sibling in folder.iterdir()
        }
        for module in imported_modules(ast.parse(path.read_text(encoding="utf-8"))) - sys.stdlib_module_names - local - OPTIONAL:
            if IMPORT_TO_PACKAGE.get(module, module) not in allowed and module != "tomllib":
                missing.append(f"{path.relative_to(ROOT)}: {module}")
    assert not missing


def python_files() -> list[Path]:
    folders = ("library", "networks", "tools", "assets", "tests", "benchmarks")
    return [*ROOT.glob("*.py"), *itertools.chain.from_iterable((ROOT / folder).rglob("*.py") for folder in folders)]


def imported_modules(tree: ast.AST) -> set[str]:
    """Top-level names of all imports, those inside functions included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names
