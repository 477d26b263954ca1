"""What is asked of glibc is done by it: blocks of a megabyte have pages of their own, also after larger ones were freed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import large_blocks_have_pages

CODE = """
import sys
from helpers import large_blocks_have_pages
from limbeck import heap

for wanted in sys.argv[1].split():
    heap.without_holes(wanted == "yes")
print(large_blocks_have_pages())
"""


@pytest.mark.parametrize(("asked", "expected"), [("yes", "True"), ("", "False"), ("no", "False"), ("yes no", "False")])
def test_large_blocks_have_pages_of_their_own(asked: str, expected: str) -> None:
    if large_blocks_have_pages() is None:
        pytest.skip("no glibc from 2.33 on")
    done = subprocess.run([sys.executable, "-c", CODE, asked], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == expected, done.stderr
