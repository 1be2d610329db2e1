"""The soak and the benchmark, for a few seconds, so that they cannot rot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_soaks() -> None:
    result = run("tests/soak.py", "--seconds", "3", "--seed", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    line = result.stdout.splitlines()[-1]
    found = re.match(
        r"soak: ([\d,]+) connections served, ([\d,]+) bytes checked, ([\d,]+) faults injected, 0 losses", line
    )
    assert found, line
    assert all(int(figure.replace(",", "")) > 10 for figure in found.groups())


def test_measures(tmp_path: Path) -> None:
    result = run("tests/benchmark", "--quick", "--json", str(tmp_path / "figures"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| this server" in result.stdout
    assert json.loads((tmp_path / "figures").read_text())
