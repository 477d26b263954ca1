"""The head compiled says what it says otherwise, in one graph for every number of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_compiled_losses_are_the_same_and_are_compiled_once() -> None:
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 5
    for name, case in found.items():
        assert 0 <= case["error"] < 1e-6, (name, case)
        assert case["graphs"] == 1 and case["breaks"] == 0, (name, case)
