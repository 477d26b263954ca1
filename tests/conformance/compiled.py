"""The fused head compiled and not, on cases of the suite: `python tests/conformance/compiled.py [CASE ...]` prints how far apart they are.

A program of its own: under pytest the checks of shapes stand between the compiler and the code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from conformance.cases import N, V, draw, signal_of
from limbeck.kernels import CompiledBlock
from limbeck.objectives import CrossEntropy, Logits, OutputTerm
from limbeck.objectives.head import Compiled, Head, fused

CASES: dict[str, tuple[str, dict[str, OutputTerm]]] = {
    "sft": ("none", {"ce": CrossEntropy()}),
    "dense": ("dense", {"ce": CrossEntropy(), "logits": Logits(divergence="jsd", temperature=2.0, trust_threshold=0.1)}),
    "top_4": ("top_4", {"ce": CrossEntropy(), "logits": Logits()}),
    "spread_4": ("spread_4", {"logits": Logits(divergence="reverse_kl")}),
    "drawn": ("drawn", {"logits": Logits()}),
}
ROWS = (N, 3, 2, 1, 7)
"""Rows of one call after the other: each is another size of block."""


def outcome(target: str, terms: Mapping[str, OutputTerm], rows: int, compiled: Compiled | None) -> list[Tensor]:
    """The loss, the sums and the gradients of hidden states and head."""
    hidden = draw(rows, 5, seed=3).float().requires_grad_()
    weight = draw(V, 5, seed=4).float().requires_grad_()
    signal = signal_of("dense" if target == "none" else target, draw(rows, V, seed=1))
    scales = {key: 0.7 / (i + 1) for i, key in enumerate(terms)}
    targets = draw(rows, V, seed=5).argmax(-1)
    if target == "none":
        signal = type(signal)()
    loss, sums = fused(hidden, Head(weight, soft_cap=9.0), targets, signal, terms, scales, 1, compiled)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return [loss.detach(), *sums.values(), hidden.grad, weight.grad]


def main() -> None:
    found = {}
    for name in sys.argv[1:] or CASES:
        target, terms = CASES[name]
        compiled, error = CompiledBlock(terms), 0.0
        torch._dynamo.utils.counters.clear()
        for rows in ROWS:
            ours, theirs = (outcome(target, terms, rows, each) for each in (compiled, None))
            error = max(error, *(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in zip(ours, theirs, strict=True)))
        counted = torch._dynamo.utils.counters
        found[name] = {
            "error": error,
            "graphs": counted["stats"]["unique_graphs"],
            "breaks": sum(counted["graph_break"].values()),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
