"""Run the tests, with pytest: `python3 tests`, or for example `python3 tests -k echo`.

pytest gets all arguments.  Without arguments, each file has a pytest of its own, and as many run at the same
time as there are processors.  If this Python has no pytest, pip installs it in the repository's .venv, in the
folder where a virtual environment of this Python version keeps its packages.

To add a test, choose the file by the promise: test_server (no options, addresses), test_options (seats,
--echo, --every, --trace), test_messages, test_outputs (stdout and stderr), test_stop, test_resources (failed
calls), test_protocols, test_client, test_readme (its sessions and claims), test_exercises, test_misbehave.
conftest.py holds the helpers.  An example:

    def test_an_echo(start: Start) -> None:
        server = start("--echo", "--wait-for", "1")  # a process on a free port, ended after the test
        client = server.seat()  # connect() returns earlier: before the server has logged the client
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"

Wait for an event, never for a time: server.err.wait_for(pattern) waits for a line of the log, messages() for
standard output, eventually() for any condition, and settled() until the server sleeps and stays asleep.

`failing` lets one system call of the server fail, or changes a constant of it.  The tools are programs of
their own: faults.py shows the faults of the lecture's script and checks any server for them, inject.py
lets each system call fail once (with strace), soak.py serves random clients for as long as you want, and
many.py holds thousands of connections.
"""

import contextlib
import glob
import importlib.util
import os
import runpy
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
from typing import IO, Dict, List, NoReturn, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
VENV = os.path.join(ROOT, ".venv")
PACKAGES = sysconfig.get_path("purelib", "posix_prefix", {"base": VENV})
OLDEST_PYTHON, OLDEST_PYTEST = (3, 8), 6

# The user's settings of pip must not contradict --target, stop the installation or ask a question.
PIP_OPTIONS = ["--quiet", "--upgrade", "--prefix=", "--target", PACKAGES]
PIP_SETTINGS = {"PIP_REQUIRE_VIRTUALENV": "0", "PIP_USER": "0", "PIP_NO_INPUT": "1"}
PIP_SETTINGS.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_ROOT_USER_ACTION="ignore")


def fail(reason: str) -> NoReturn:
    """End with one line."""
    sys.exit(f"tests: {reason}")


def has_pytest() -> bool:
    """Return whether this Python can import a pytest that is neither broken nor too old."""
    before = set(sys.modules)
    try:
        import pytest

        if int(pytest.__version__.split(".")[0]) >= OLDEST_PYTEST:
            return True
    except Exception:  # for example an old pytest on a new Python
        pass
    for name in set(sys.modules) - before:
        del sys.modules[name]
    return False


def install_pytest() -> None:
    """Install pytest in PACKAGES, with pip."""
    try:
        os.makedirs(PACKAGES, exist_ok=True)
        tempfile.TemporaryFile(dir=PACKAGES).close()
    except OSError as error:
        fail(
            f"cannot install pytest in {VENV}: {error.strerror} (install it yourself, or copy the repository)"
        )
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip"]
        if not importlib.util.find_spec("pip"):  # the venv module may bring its own
            venv = [sys.executable, "-m", "venv", folder]
            if subprocess.run(
                venv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
            ).returncode:
                fail("this Python has no pip to install pytest (Debian, Ubuntu: apt install python3-pip)")
            pip = [os.path.join(folder, "bin", "python"), "-I", "-m", "pip"]
        print(f"tests: this Python has no pytest; pip installs it in {VENV}", file=sys.stderr, flush=True)
        command = [*pip, "install", *PIP_OPTIONS, "pytest"]
        environment = {**os.environ, **PIP_SETTINGS}
        if subprocess.call(command, env=environment, stdin=subprocess.DEVNULL, cwd=ROOT):
            fail("pip cannot install pytest; its reason is above")
    importlib.invalidate_caches()


def run_pytest(arguments: List[str]) -> NoReturn:
    """Run pytest in this process, and exit with its status."""
    # Paths among the arguments are relative to the current directory.  Without one, pytest uses testpaths.
    options = ["-c", os.path.join(ROOT, ".pytest.ini"), "--rootdir", os.getcwd()]
    options += ["-o", "testpaths=" + shlex.quote(os.path.relpath(HERE))]
    if os.access(ROOT, os.W_OK):
        options += ["-o", "cache_dir=" + os.path.join(ROOT, ".pytest_cache")]
    else:
        options += ["-p", "no:cacheprovider"]
    sys.argv[1:] = [*options, *arguments]
    runpy.run_module("pytest", run_name="__main__", alter_sys=True)  # as `python3 -m pytest`
    sys.exit("tests: pytest has not ended this process")


def run_files(files: List[str]) -> NoReturn:
    """Run a pytest for each file, print each output when it is complete, and exit with 1 if one fails.

    After SIGINT or SIGTERM, exit with 130 when those that run have ended their tests' processes.
    """
    running: Dict[int, Tuple[str, IO[bytes]]] = {}  # by process
    failed: List[str] = []
    interrupted = False
    output: IO[bytes]
    processors = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # PyPy does not have it
        processors = len(os.sched_getaffinity(0))

    def stop(number: int, _: object) -> None:
        nonlocal interrupted
        interrupted = True
        files.clear()
        if number == signal.SIGTERM:  # a terminal sends SIGINT to all processes
            for process in running:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process, number)

    signals = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    for number in signals:
        signal.signal(number, stop)
    while files or running:
        if files and len(running) < processors:
            file, output = files.pop(0), tempfile.TemporaryFile()  # noqa: SIM115
            process = os.fork()
            if not process:
                for number in signals:
                    signal.signal(number, signal.default_int_handler)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                run_pytest(["-q", file])
            running[process] = file, output
        else:
            process, status = os.wait()
            file, output = running.pop(process)
            with output:
                output.seek(0)
                print(file, output.read().decode(errors="replace"), sep="\n", flush=True)
            if status:
                failed.append(file)
    if interrupted:
        sys.exit(130)
    sys.exit("tests: failed: " + ", ".join(failed) if failed else 0)


def main() -> None:
    """Run pytest; raise SystemExit with its exit status."""
    if sys.version_info < OLDEST_PYTHON:
        fail("Python 3.8 or newer is needed; this is {}.{}".format(*sys.version_info))
    sys.path[0] = HERE  # it is relative to the current directory, or is that directory
    if not has_pytest():
        sys.path.insert(0, PACKAGES)
        if not has_pytest():
            install_pytest()
            if not has_pytest():
                fail(f"pip installed pytest in {VENV}, but this Python cannot import it")

    files = [os.path.relpath(file) for file in glob.glob(os.path.join(glob.escape(HERE), "test_*.py"))]
    if len(sys.argv) > 1 or len(files) < 2:
        run_pytest(sys.argv[1:])
    run_files(sorted(files, key=os.path.getsize, reverse=True))  # the longest first


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
