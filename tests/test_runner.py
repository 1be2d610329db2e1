"""Tests of `python3 tests`, run in a copy: with and without pytest, pip and a writable folder.

Stand-ins for pip and pytest are modules on PYTHONPATH; -S hides what this Python has installed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import DEADLINE, ROOT

RUNNER = ROOT / "tests" / "__main__.py"
PYTEST = {
    "pytest/__init__.py": "__version__ = '8.0'",
    "pytest/__main__.py": "import json, sys; print(json.dumps([__file__, *sys.argv[1:]])); sys.exit(3)",
}
# It installs PYTEST, as pip would do.
PIP = f"""
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
for name, text in {PYTEST!r}.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
"""
# It makes an environment whose Python can only run PIP.
VENV = f"""
import pathlib, sys
python = pathlib.Path(sys.argv[-1], "bin", "python")
python.parent.mkdir()
python.write_text("#!" + sys.executable + chr(10) + {PIP!r})
python.chmod(0o755)
"""
NO_VENV = {"venv.py": "raise SystemExit('ensurepip is not available')"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


class Copy:
    """A copy of the files that the runner needs, and modules that its Python finds first."""

    def __init__(self, folder: Path) -> None:
        self.root, self.modules = folder / "a copy", folder / "modules"
        self.venv = self.root / ".venv"
        write(self.root, {"tests/__main__.py": RUNNER.read_text()})
        write(self.root, {"tests/test_it.py": "import pytest\ndef test_it(): pytest.skip('for a reason')"})
        shutil.copy(ROOT / ".pytest.ini", self.root)
        self.modules.mkdir()

    def run(
        self, *arguments: str, cwd: str = ".", tests: str = "tests", variables: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = {name: text for name, text in os.environ.items() if not name.startswith(("PIP_", "PY"))}
        environment.update(PYTHONPATH=str(self.modules), PYTHONDONTWRITEBYTECODE="1")
        environment.update(variables or {})
        return subprocess.run(
            [sys.executable, "-S", tests, *arguments],
            cwd=self.root / cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE,
        )


def stand_in(result: subprocess.CompletedProcess[str]) -> tuple[Path, list[str]]:
    """Return the file and the arguments of the stand-in for pytest that ran; its status is the runner's."""
    assert result.returncode == 3, result.stderr
    file, *arguments = json.loads(result.stdout)
    return Path(file), arguments


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_uses_the_pytest_of_this_python(copy: Copy) -> None:
    write(copy.modules, PYTEST)
    result = copy.run("-k", "echo")
    file, arguments = stand_in(result)
    assert (file, arguments[-2:]) == (copy.modules / "pytest/__main__.py", ["-k", "echo"])
    assert result.stderr == ""
    assert not copy.venv.exists()


@pytest.mark.parametrize(
    ("cwd", "tests", "arguments"),
    [("tests", ".", ["test_it.py"]), ("..", "a copy/tests", ["-k", "it"])],
)
def test_runs_from_every_folder_and_reports_skipped_tests(
    copy: Copy, cwd: str, tests: str, arguments: list[str]
) -> None:
    installed = str(Path(pytest.__file__).parent.parent)
    result = copy.run(*arguments, cwd=cwd, tests=tests, variables={"PYTHONPATH": installed})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "for a reason\n" in result.stdout
    assert "1 skipped" in result.stdout.splitlines()[-1]


def test_without_arguments_each_file_has_a_pytest_of_its_own(copy: Copy) -> None:
    variables = {"PYTHONPATH": str(Path(pytest.__file__).parent.parent)}
    write(copy.root, {"tests/test_more.py": "def test_one(): pass\ndef test_two(): pass"})
    result = copy.run(variables=variables)
    assert (result.returncode, result.stderr) == (0, "")
    for name, end in ("it", "1 skipped"), ("more", "2 passed"):
        assert re.search(rf"^tests/test_{name}\.py\n(?:.*\n)*?{end} in ", result.stdout, re.MULTILINE)
    write(copy.root, {"tests/test_wrong.py": "def test_wrong(): print('why') or 1 / 0"})
    result = copy.run(cwd="tests", tests=".", variables=variables)
    assert (result.returncode, result.stderr) == (1, "tests: failed: test_wrong.py\n")
    assert re.search(r"^test_wrong\.py\n(?:.*\n)*why\n(?:.*\n)*1 failed in ", result.stdout, re.MULTILINE)
    assert re.search("^2 passed in ", result.stdout, re.MULTILINE)


LONG = """
import pathlib, signal, time

def test_long():
    try:
        pathlib.Path("ready").write_text("a reader waits for this")
        signal.pause()
    finally:
        time.sleep(0.2)
        pathlib.Path("cleaned").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_waits_until_its_tests_have_cleaned_up(copy: Copy, number: int) -> None:
    write(copy.root, {"tests/test_long.py": LONG})
    os.mkfifo(copy.root / "ready")
    environment = {**os.environ, "PYTHONPATH": str(Path(pytest.__file__).parent.parent)}
    how = {"cwd": copy.root, "env": environment, "start_new_session": True, "text": True}
    with subprocess.Popen([sys.executable, "tests"], stdout=subprocess.PIPE, **how) as process:  # type: ignore[call-overload]
        (copy.root / "ready").read_text()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=DEADLINE)
    assert (process.returncode, (copy.root / "cleaned").exists()) == (130, True)
    assert re.search(r"^tests/test_long\.py\n(?:.*\n)*!+ KeyboardInterrupt !+$", output, re.MULTILINE)


def real_pip(copy: Copy) -> dict[str, str]:
    """Let the copy use this Python's pip, which finds PYTEST in a folder; return the variables for that."""
    pip = importlib.util.find_spec("pip")
    if not pip or not pip.origin:
        pytest.skip("this Python has no pip")
    (copy.modules / "pip").symlink_to(Path(pip.origin).parent)
    with zipfile.ZipFile(copy.modules / "pytest-8.0-py3-none-any.whl", "w") as wheel:
        about = {
            "METADATA": "Metadata-Version: 2.1\nName: pytest\nVersion: 8.0\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        for name, text in {**PYTEST, **{f"pytest-8.0.dist-info/{key}": about[key] for key in about}}.items():
            wheel.writestr(name, text)
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(copy.modules), "PIP_CONFIG_FILE": os.devnull}


def test_pip_installs_pytest_despite_the_users_settings(copy: Copy, tmp_path: Path) -> None:
    """Settings of pip, a .venv of another Python and an incomplete .venv do not prevent it."""
    variables = real_pip(copy)
    version = ("pypy" if sys.implementation.name == "pypy" else "python") + "{}.{}".format(*sys.version_info)
    for folder in version, "python2.7":
        write(copy.venv, {f"lib/{folder}/site-packages/pytest/__init__.py": "import that_is_missing"})
    write(copy.venv, {"pyvenv.cfg": "home = /nowhere"})
    (copy.venv / "bin").mkdir()
    (copy.venv / "bin" / "python").symlink_to("/nowhere/python2.7")
    for setting in "PIP_TARGET", "PIP_PREFIX":
        variables[setting] = str(tmp_path / "other")
    result = copy.run(variables={**variables, "PIP_REQUIRE_VIRTUALENV": "1", "PIP_USER": "1"})
    assert copy.venv in stand_in(result)[0].parents
    first = f"tests: this Python has no pytest; pip installs it in {copy.venv}\n"
    assert result.stderr.startswith(first)  # pip may complain about packages of this Python after it
    again = copy.run()
    assert (again.stdout, again.stderr) == (result.stdout, "")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("version", ["__version__ = '4.6.9'", "import that_is_missing"])
def test_a_pytest_that_is_too_old_or_broken_is_not_used(copy: Copy, version: str) -> None:
    write(copy.modules, {"pytest.py": version, "pip.py": PIP})
    assert copy.venv in stand_in(copy.run())[0].parents


def test_a_python_without_pip_uses_the_pip_of_a_virtual_environment(copy: Copy) -> None:
    write(copy.modules, {"venv.py": VENV})
    assert copy.venv in stand_in(copy.run())[0].parents


@pytest.mark.parametrize("prepare", ["no pip", "no folder", "old Python"])
def test_one_line_reports_what_is_missing(copy: Copy, prepare: str) -> None:
    if prepare == "no pip":
        write(copy.modules, NO_VENV)
        reason = "this Python has no pip to install pytest (Debian, Ubuntu: apt install python3-pip)"
    elif prepare == "no folder":
        copy.venv.write_text("a file, so that not even root can make a folder here")
        reason = f"cannot install pytest in {copy.venv}: Not a directory "
        reason += "(install it yourself, or copy the repository)"
    else:
        write(
            copy.modules, {"shlex.py": "import sys; sys.version_info = (3, 7, 16)"}
        )  # which the runner imports
        reason = "Python 3.8 or newer is needed; this is 3.7"
    result = copy.run()
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"tests: {reason}\n")


def test_a_failure_of_pip_is_reported(copy: Copy) -> None:
    write(copy.modules, {"pip.py": "raise SystemExit('no network')"})
    result = copy.run()
    assert result.returncode == 1
    assert result.stderr.endswith("\nno network\ntests: pip cannot install pytest; its reason is above\n")


def test_an_old_python_can_parse_the_runner() -> None:
    ast.parse(RUNNER.read_text(), feature_version=(3, 6))
