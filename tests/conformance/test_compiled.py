"""The head compiled says what it says otherwise, in one graph for every number of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="needs a C++ compiler")
def test_compiled_losses_are_the_same_and_are_compiled_once() -> None:
    script, names = Path(__file__).with_name("compiled.py"), ["dense", "top_4", "drawn"]  # the others take as long again
    done = subprocess.run([sys.executable, str(script), *names], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == names
    for name, case in found.items():
        assert 0 <= case["error"] < 2e-6, (name, case)
        assert case["graphs"] == 1 and case["breaks"] == 0, (name, case)
