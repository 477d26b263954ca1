"""What is asked of glibc is done by it: blocks of a megabyte have pages of their own, also after larger ones were freed."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

CODE = """
import ctypes, sys
from limbeck import heap

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Info
for wanted in sys.argv[1].split():
    heap.without_holes(wanted == "yes")
del (large := [bytearray(16 << 20)])[:]  # from here on glibc would have all that is smaller in its heap
before = libc.mallinfo2().hblkhd
block = bytearray(4 << 20)
print(libc.mallinfo2().hblkhd - before >= 4 << 20)
"""


@pytest.mark.parametrize(("asked", "expected"), [("yes", "True"), ("", "False"), ("no", "False"), ("yes no", "False")])
def test_large_blocks_have_pages_of_their_own(asked: str, expected: str) -> None:
    try:
        ctypes.CDLL("libc.so.6").mallinfo2  # noqa: B018
    except (OSError, AttributeError):
        pytest.skip("no glibc from 2.33 on")
    done = subprocess.run([sys.executable, "-c", CODE, asked], capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
