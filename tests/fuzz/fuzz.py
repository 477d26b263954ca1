"""What is thrown at readers: JSON of any shape, and a good tree or file with something changed in it. `from fuzz import ...`.

Each test takes a few examples, the same every time. `LIMBECK_FUZZ=2000 scripts/test tests/fuzz` takes as many, other ones every time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("LIMBECK_FUZZ", "0"))

STRANGE = [
    "", " ", "\x00", "\ud83d", "e\u0301", "\u2028", "..", "/", "~", "a" * 300, "{{", "!!python/object", "nan", "null", "0", "-1", "1e400",
    "<|im_end|>", "\U0001f98a", "https://a:b@c/d", "x" * 70_000,
]  # fmt: skip
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, -(10**400), 0.0, -0.5, 1e-320, 1e308, float("inf"), float("nan")]),
    st.sampled_from(STRANGE),
    st.text(max_size=8),
    st.integers(-3, 5),
)
names = st.one_of(st.sampled_from(["type", "role", "content", "name", "path", "data"]), st.text(max_size=4))
json_values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)), max_leaves=6
)


def fuzzed(examples: int) -> Any:
    """Settings of a test: so many examples in the suite, `LIMBECK_FUZZ` where it is set."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a tree."""
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def changed(draw: Any, tree: Any, most: int = 2) -> Any:
    """A tree with up to `most` values replaced, removed, added, or put in the place of another."""
    new = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        known = list(places(new))
        if not known:
            return draw(json_values)
        *parents, last = draw(st.sampled_from(known))
        node = new
        for key in parents:
            node = node[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "add", "move"])):
            case "replace":
                node[last] = draw(json_values)
            case "remove":
                del node[last]
            case "add":
                if isinstance(node, dict):
                    node[draw(st.text(max_size=5))] = draw(json_values)
                else:
                    node.append(draw(json_values))
            case "move":
                *others, end = draw(st.sampled_from(known))
                value = tree
                try:
                    for key in (*others, end):
                        value = value[key]
                except (KeyError, IndexError, TypeError):
                    continue
                node[last] = copy.deepcopy(value)
    return new


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Bytes with some altered, cut off, doubled or put in."""
    new = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(new) - 1, 0)))
        match draw(st.sampled_from(["flip", "flip", "cut", "put in", "zero", "double"])):
            case "flip" if new:
                new[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del new[at:]
            case "put in":
                new[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "zero":
                new[at : at + 64] = bytes(len(new[at : at + 64]))
            case "double":
                new[at:at] = new[at : at + 200]
    return bytes(new)
