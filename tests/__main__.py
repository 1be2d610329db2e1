"""Run the tests, with pytest: `python3 tests`, or for example `python3 tests -k echo`.

pytest gets all arguments.  If this Python has no pytest, pip installs it in the repository's .venv, in the
folder where a virtual environment of this Python version keeps its packages.
"""

import glob
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from typing import Any, List, NoReturn

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
VENV = os.path.join(ROOT, ".venv")
PACKAGES = sysconfig.get_path("purelib", "posix_prefix", {"base": VENV})
OLDEST_PYTHON, OLDEST_PYTEST = (3, 8), 6

# Settings of pip that contradict --target, or that stop or question an installation.
PIP_SETTINGS = {"PIP_" + name: "" for name in ("PREFIX", "ROOT", "PYTHON", "DRY_RUN", "NO_DEPS")}
PIP_SETTINGS.update(PIP_REQUIRE_VIRTUALENV="0", PIP_USER="0", PIP_NO_INPUT="1")
PIP_SETTINGS.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_ROOT_USER_ACTION="ignore")


def fail(reason: str) -> NoReturn:
    """End with one line."""
    sys.exit(f"tests: {reason}")


def import_pytest() -> Any:
    """Return the module, or None if it is missing, broken or too old."""
    before = set(sys.modules)
    try:
        import pytest

        if int(pytest.__version__.split(".")[0]) >= OLDEST_PYTEST:
            return pytest
    except Exception:  # for example an old pytest on a new Python
        pass
    for name in set(sys.modules) - before:
        del sys.modules[name]
    return None


def install_pytest() -> None:
    """Let pip install pytest in PACKAGES."""
    try:
        os.makedirs(PACKAGES, exist_ok=True)
        tempfile.TemporaryFile(dir=PACKAGES).close()
    except OSError as error:
        fail(
            f"cannot install pytest in {VENV}: {error.strerror} (install it yourself, or copy the repository)"
        )
    print(f"tests: this Python has no pytest; pip installs it in {VENV}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip"]
        if not importlib.util.find_spec("pip"):  # the venv module may bring its own
            if subprocess.call([sys.executable, "-m", "venv", folder], stdout=subprocess.DEVNULL, cwd=ROOT):
                fail("this Python has no pip to install pytest (Debian, Ubuntu: apt install python3-pip)")
            pip = [os.path.join(folder, "bin", "python"), "-I", "-m", "pip"]
        command = [*pip, "install", "--quiet", "--upgrade", "--target", PACKAGES, "pytest"]
        environment = {**os.environ, **PIP_SETTINGS}
        if subprocess.call(command, env=environment, stdin=subprocess.DEVNULL, cwd=ROOT):
            fail("pip cannot install pytest; its reason is above")
    importlib.invalidate_caches()


def main(arguments: List[str]) -> int:
    """Return pytest's exit status."""
    if sys.version_info < OLDEST_PYTHON:
        fail("Python 3.8 or newer is needed; this is {}.{}".format(*sys.version_info))
    sys.path[0] = HERE  # it is relative to the current directory, or is that directory
    pytest = import_pytest()
    if not pytest:
        sys.path.insert(0, PACKAGES)
        pytest = import_pytest()
    if not pytest:
        install_pytest()
        pytest = import_pytest()
    if not pytest:
        fail(f"pip installed pytest in {VENV}, but this Python cannot import it")

    # Paths among the arguments are relative to the current directory.  Without one, pytest takes testpaths.
    settings = [
        "testpaths=" + shlex.quote(glob.escape(HERE)),
        "cache_dir=" + os.path.join(ROOT, ".pytest_cache"),
    ]
    options = ["-c", os.path.join(ROOT, ".pytest.ini"), "--rootdir", os.getcwd()]
    options += [word for setting in settings for word in ("-o", setting)]
    if not os.access(ROOT, os.W_OK):
        options += ["-p", "no:cacheprovider"]
    return int(pytest.main([*options, *arguments]))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
