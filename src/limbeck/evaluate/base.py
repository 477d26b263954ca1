"""Benchmark: named, versioned cases and a grader. A result keeps every item, so that two models can be compared item by item.

An item holds a (sum, count) per metric, because some metrics are averages over tokens or bytes and not over items:
the value of a metric is sum(sums) / sum(counts), and its standard error is that of this ratio over items (delta method).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from limbeck.spec import Family

if TYPE_CHECKING:
    from limbeck.teachers.base import Teacher
    from limbeck.tokens.sample import Sample


@dataclass(frozen=True)
class Item:
    """One graded case. `id` is stable across models, machines and subsets; `detail` says what was extracted and expected."""

    id: str
    sums: dict[str, float]
    counts: dict[str, float]
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A metric over all items. `chance` is what guessing scores, where that is defined."""

    value: float | None
    """None where no item counts."""
    stderr: float | None
    """Standard error over items; None where it is not defined."""
    num_items: int
    higher_is_better: bool
    chance: float | None = None


@dataclass(frozen=True)
class Result:
    """A benchmark's outcome, as it lies in `evals/NAME.json`."""

    name: str
    version: int
    settings: dict[str, Any]
    metrics: dict[str, Metric]
    items: list[Item]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """The model under test: an HF causal LM in eval mode with its tokenizer, and the teacher that it is compared with, if any."""

    model: Any
    tokenizer: Any
    device: str = "cpu"
    teacher: Teacher | None = None


class Benchmark(Family):
    """Base of the family of benchmarks. `name` is the file name of its result and its key in tables."""

    type: str
    name: str = ""
    """Key of the result; the `type` where it is empty."""

    version: ClassVar[int]
    """Raised whenever cases, prompts or grading change, so that old and new results are never compared."""
    needs_teacher: ClassVar[bool] = False
    higher_is_better: ClassVar[dict[str, bool]]
    """The metrics of this benchmark and their direction, in the order in which tables show them."""

    @property
    def key(self) -> str:
        return self.name or self.type

    def run(self, subject: Subject) -> list[Item]:
        """Grade every case."""
        raise NotImplementedError

    def samples(self, tokenizer: Any) -> list[Sample]:
        """What a teacher is asked to score here, so that a capture can hold it; nothing for most benchmarks."""
        return []

    def metrics(self, items: Sequence[Item]) -> dict[str, Metric]:
        """Metrics over items; override where one is not a ratio of sums (ECE)."""
        return {name: ratio(items, name, better) for name, better in self.higher_is_better.items()}


def ratio(items: Sequence[Item], name: str, higher_is_better: bool, chance: float | None = None) -> Metric:
    """sum(sums) / sum(counts) of a metric, with the delta-method standard error over items."""
    pairs = [(item.sums[name], item.counts[name]) for item in items if item.counts.get(name)]
    total, count = math.fsum(s for s, _ in pairs), math.fsum(c for _, c in pairs)
    if not count:
        return Metric(None, None, 0, higher_is_better, chance)
    value, n = total / count, len(pairs)
    squares = math.fsum((s - value * c) ** 2 for s, c in pairs)
    stderr = math.sqrt(squares * n / (n - 1)) / count if n > 1 else None
    return Metric(value, stderr, n, higher_is_better, chance)
