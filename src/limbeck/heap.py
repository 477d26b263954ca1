"""Heap: what is asked of the C library's allocator. Where that is not glibc, nothing is."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""
SMALL, LARGE = 2**20, 2**25
"""Bytes from which a block has pages of its own: as it is asked for here, and what glibc's threshold rises to by itself."""

_asked = False


def without_holes(wanted: bool) -> None:
    """Give every tensor of a megabyte and more pages of its own from here on, which go back when it is freed; or no longer.

    In the heap, where else all below 32 MB are, glibc before 2.38 does not find the place of one aligned block for another of the same size
    (its bug 14581), once a few bytes beside it are taken. Adapters, and weights that are gathered from other processes, make many blocks
    that live briefly: a fifth, and a quarter to nearly half, of such runs' memory was that (benchmarks/README.md). Fresh pages cost time
    where weights have gradients, and none was found where adapters alone do.
    """
    global _asked
    if wanted != _asked:
        _asked = wanted
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, SMALL if wanted else LARGE)


def give_back() -> None:
    """Return what is free to the system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
