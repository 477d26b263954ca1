"""Benchmark: named, versioned cases and a grader. A result keeps every item, so that two models can be compared item by item.

An item holds a (sum, count) per metric, because some metrics are averages over tokens or bytes and not over items:
the value of a metric is sum(sums) / sum(counts), and its standard error is that of this ratio over items (delta method).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import TypeAdapter, ValidationError, field_validator

from limbeck.errors import RecipeError, RunError, nearest
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
    """A metric over all items, between what guessing scores (`chance`) and the best that there is (`ceiling`), where these are known."""

    value: float | None
    """None where no item counts."""
    stderr: float | None
    """Standard error over items; None where it is not defined."""
    num_items: int
    higher_is_better: bool
    chance: float | None = None
    ceiling: float | None = None
    """The best value, also where lower is better; None where nobody knows it, as for bits per byte."""


@dataclass(frozen=True)
class Result:
    """A benchmark's outcome, as it lies in `evals/NAME.json`."""

    name: str
    version: int
    settings: dict[str, Any]
    metrics: dict[str, Metric]
    items: list[Item]
    seconds: float
    cases: str = ""
    """`Benchmark.fingerprint()`: results compare only where it is the same."""
    subject: dict[str, Any] = field(default_factory=dict)
    """What was graded: hashes of weights and chat template, and the teacher where it was asked."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Any, where: str = "result") -> Result:
        """The inverse of `to_json`."""
        try:
            metrics = {name: Metric(**metric) for name, metric in tree["metrics"].items()}
            found = cls(**{**tree, "metrics": metrics, "items": [Item(**item) for item in tree["items"]]})  # which know no other parts
            types_of(cls).validate_python(tree)
            return found
        except (KeyError, TypeError, AttributeError, ValidationError) as error:
            raise RunError(f"{where}: no benchmark result as Limbeck writes it: {' '.join(str(error).split())[:200]}") from error


types_of: Callable[[Any], Any] = cache(TypeAdapter)
"""What checks that the values of a dataclass, as JSON had them, are of its types."""


@dataclass(frozen=True)
class Subject:
    """The model under test: an HF causal LM in eval mode with its tokenizer, and the teacher that it is compared with, if any.

    `done` are items by id that an earlier run, which was interrupted, has graded: a benchmark that yields its items may pass over them.
    """

    model: Any
    tokenizer: Any
    device: str = "cpu"
    teacher: Teacher | None = None
    done: Mapping[str, Item] = field(default_factory=dict)
    content: str | None = None
    """SHA-256 of the folder that it comes from, where somebody may have changed that: its configuration, how its tokenizer splits."""


class Benchmark(Family):
    """Base of the family of benchmarks. `name` is the file name of its result and its key in tables."""

    type: str
    name: str = ""
    """Key of the result in tables, and the name of its file; the `type` where it is empty."""

    version: ClassVar[int]
    """Raised whenever cases, prompts or grading change, so that old and new results are never compared."""
    needs_teacher: ClassVar[bool] = False
    higher_is_better: ClassVar[dict[str, bool]]
    """The metrics of this benchmark and their direction, in the order in which tables show them."""
    ceilings: ClassVar[dict[str, float]] = {}
    """The best value of a metric, where it is known: 1 for a share of right answers, 0 for a divergence."""

    @property
    def key(self) -> str:
        return self.name or self.type

    @field_validator("name")
    @classmethod
    def _file_name(cls, name: str) -> str:
        if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name):
            raise ValueError("expected a name that can be a file's: letters, digits and . _ + -, starting with a letter or digit")
        return name

    def metric_named(self, metric: str, where: str) -> str:
        """The metric that is meant: as named, or the first where it is empty; RecipeError where there is none of that name."""
        known = list(self.higher_is_better)
        if not known:  # metrics are told by what is run
            return metric
        if metric and metric.partition("/")[0] not in known:
            raise RecipeError(f"{where}: found {metric!r}, expected a metric of {self.key!r}: {', '.join(known)}{nearest(metric, known)}")
        return metric or known[0]

    def check(self) -> None:
        """Raise on what would stop `run` and shows before a model is loaded: a missing file, a bad row, an unknown task. Torch-free."""

    def fingerprint(self) -> str:
        """What else decides the cases, beyond the settings: the hash of a data file, the version of a generator."""
        return ""

    def run(self, subject: Subject) -> Iterable[Item]:
        """Grade every case, or every one that is not in `subject.done`. The caller sets eval mode and `no_grad`, and keeps each item as it
        comes: one that is yielded is not lost when the run is interrupted."""
        raise NotImplementedError

    def samples(self, tokenizer: Any) -> list[Sample]:
        """What a teacher is asked to score here, so that a capture can hold it; nothing for most benchmarks."""
        return []

    def metrics(self, items: Sequence[Item]) -> dict[str, Metric]:
        """Metrics over items; override where one is not a ratio of sums (ECE)."""
        return {name: ratio(items, name, better, ceiling=self.ceilings.get(name)) for name, better in self.higher_is_better.items()}


def ratio(items: Sequence[Item], name: str, higher_is_better: bool, chance: float | None = None, ceiling: float | None = None) -> Metric:
    """sum(sums) / sum(counts) of a metric, with the delta-method standard error over items."""
    pairs = [(item.sums[name], item.counts[name]) for item in items if item.counts.get(name)]
    total, count = math.fsum(s for s, _ in pairs), math.fsum(c for _, c in pairs)
    if not count:
        return Metric(None, None, 0, higher_is_better, chance, ceiling)
    value, n = total / count, len(pairs)
    squares = math.fsum((s - value * c) ** 2 for s, c in pairs)
    stderr = math.sqrt(squares * n / (n - 1)) / count if n > 1 else None
    return Metric(value, stderr, n, higher_is_better, chance, ceiling)
