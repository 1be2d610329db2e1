"""Tests of the soak, in short runs."""

from __future__ import annotations

import re
import subprocess
import sys

from conftest import ROOT


def test_a_short_soak_finds_no_loss() -> None:
    """Even a short soak can fail: each of its modes serves 20 random clients and has every turn."""
    command = [sys.executable, "tests/soak.py", "--quick", "--seconds", "1", "--seed", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    line = result.stdout.splitlines()[-1]
    found = re.match(
        r"soak: ([\d,]+) connections served, ([\d,]+) bytes checked, ([\d,]+) faults injected, 0 losses", line
    )
    assert found, line
    assert all(int(figure.replace(",", "")) > 10 for figure in found.groups())
