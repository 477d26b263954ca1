"""Numbers of a report: scores, paired differences, costs, equality of budgets, headroom. No words and no layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.report.collect import TEACHER, TEACHER_NLL, Evidence, item_pairs
from limbeck.report.records import RunRecord
from limbeck.report.stats import mean_over_seeds, paired_difference, ratio, spread

BUDGETS = {
    "initial_weights_sha256": "initial weights",
    "data_sha256": "tokens of the data",
    "order_sha256": "order of the data",
    "steps": "optimizer steps",
    "tokens": "tokens trained on",
    "scored_tokens": "scored tokens trained on",
}

_LENGTH = {"train.steps", "train.epochs", "train.batch_size"}
EXCUSED = {
    "initial_weights_sha256": {"student", "student.arm"},
    "data_sha256": {"source"},
    "order_sha256": {"source", *_LENGTH},
    "steps": _LENGTH,
    "tokens": {"source", *_LENGTH},
    "scored_tokens": {"source", *_LENGTH},
}
"""What may differ in an arm that changes one of these by declaration."""


@dataclass(frozen=True)
class Score:
    """A metric of one model: its value (the mean, over several seeds), standard error over items, standard deviation over seeds."""

    value: float | None
    stderr: float | None
    sd: float | None
    num_seeds: int
    num_items: int


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline on the same items. `direction` describes, and is no verdict: more than two standard errors over
    items, and the same sign in every seed."""

    arm: str
    benchmark: str
    metric: str
    value: float
    stderr: float | None
    sd: float | None
    num_seeds: int
    num_items: int
    direction: Literal["better", "worse", "level", "unknown"]


@dataclass(frozen=True)
class Budget:
    """One quantity that must be equal over arms for one seed, by arm."""

    seed: int
    field: str
    values: dict[str, Any]

    @property
    def is_equal(self) -> bool:
        return None not in self.values.values() and len(set(self.values.values())) <= 1


@dataclass(frozen=True)
class Headroom:
    """Mean negative log-likelihood, in nats per scored token, of the teacher and of the students over the same tokens."""

    where: str
    teacher: float
    students: dict[str, float]
    name: str = TEACHER

    @property
    def nearest(self) -> str:
        """The student that predicts these tokens best."""
        return min(self.students, key=lambda arm: self.students[arm])

    @property
    def is_there(self) -> bool:
        """Whether the teacher predicts them better than every student: where it does not, distillation has little to give."""
        return self.teacher < self.students[self.nearest]


def score(per_seed: Sequence[dict[str, dict[str, Any]]], benchmark: str, metric: str) -> Score | None:
    """The score of one model; None where it was not measured."""
    found = [evals[benchmark]["metrics"][metric] for evals in per_seed if metric in evals.get(benchmark, {}).get("metrics", {})]
    values = [m["value"] for m in found if m["value"] is not None]
    if not found:
        return None
    if len(found) == 1 or not values:
        return Score(found[0]["value"], found[0]["stderr"], None, 1, found[0]["num_items"])
    across = spread(values)
    items = ratio(list(mean_over_seeds([item_pairs(evals, benchmark, metric) for evals in per_seed]).values()))
    return Score(across.mean, items.stderr if items else None, across.sd, across.num_seeds, found[0]["num_items"])


def differences(evidence: Evidence) -> list[Difference]:
    """Every arm against the baseline, on every metric that both have."""
    runs, baseline = evidence.finished, evidence.baseline
    if baseline not in runs:
        return []
    return [
        difference
        for benchmark, metric, example in evidence.benchmarks()
        for arm in runs
        if arm != baseline and (difference := _difference(runs[arm], runs[baseline], benchmark, metric, example["higher_is_better"]))
    ]


def _difference(ours: list[RunRecord], theirs: list[RunRecord], benchmark: str, metric: str, up: bool) -> Difference | None:
    by_seed = {run.seed: run.evals for run in theirs if metric in run.evals.get(benchmark, {}).get("metrics", {})}
    pairs = [(run.evals, by_seed[run.seed]) for run in ours if run.seed in by_seed and metric in _metrics(run.evals, benchmark)]
    pairs = [(a, b) for a, b in pairs if comparable(a[benchmark], b[benchmark])]
    values = [
        (_metrics(a, benchmark)[metric]["value"], _metrics(b, benchmark)[metric]["value"])
        for a, b in pairs
        if _metrics(a, benchmark)[metric]["value"] is not None and _metrics(b, benchmark)[metric]["value"] is not None
    ]
    if not values or len(values) < len(pairs):
        return None
    a_items, b_items = (mean_over_seeds([item_pairs(side, benchmark, metric) for side in sides]) for sides in zip(*pairs, strict=True))
    over_items = paired_difference(a_items, b_items)
    across = spread([a - b for a, b in values])
    # with one seed the paired estimate is used as it is: it is over the items that both have
    value = over_items.value if over_items and len(values) == 1 else across.mean
    stderr = over_items.stderr if over_items else None
    return Difference(
        ours[0].arm,
        benchmark,
        metric,
        value,
        stderr,
        across.sd,
        across.num_seeds,
        over_items.num_items if over_items else 0,
        _direction(value, stderr, [a - b for a, b in values], up),
    )


def _metrics(evals: dict[str, dict[str, Any]], benchmark: str) -> dict[str, Any]:
    return dict(evals.get(benchmark, {}).get("metrics", {}))


def comparable(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Results of another version, other settings or other cases of a benchmark are never compared."""
    return all(ours.get(key) == theirs.get(key) for key in ("version", "settings", "cases"))


def _direction(value: float, stderr: float | None, per_seed: list[float], up: bool) -> Literal["better", "worse", "level", "unknown"]:
    if stderr is None:
        return "unknown"
    if abs(value) <= 2 * stderr or any(difference * value <= 0 for difference in per_seed):
        return "level"
    return "better" if (value > 0) == up else "worse"


def cost(runs: Sequence[RunRecord]) -> dict[str, float | None]:
    """What an arm took, on average over its seeds."""
    return {
        "tokens": _over_runs(runs, "tokens"),
        "scored_tokens": _mean([float(run.scored_tokens) for run in runs if run.metrics]),
        "train_seconds": _over_runs(runs, "train_seconds"),
        "tokens_per_second": _over_runs(runs, "tokens_per_second"),
        "teacher_share": _over_runs(runs, "teacher_share"),
        "peak_memory_mb": _over_runs(runs, "peak_memory_mb"),
        "flops": _mean([spent for run in runs if (spent := total_flops(run.about)) is not None]),
        "evaluation_seconds": _mean([evaluation_seconds(run.evals) for run in runs]),
    }


def total_flops(about: dict[str, Any]) -> float | None:
    """What a run cost, student, teacher and what it started from; None where a part is not known."""
    own = about.get("compute") or {}
    parts = [own.get("student_flops"), own.get("teacher_flops"), total_flops(about["parent"]) if "parent" in about else 0.0]
    known = [float(part) for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


@dataclass(frozen=True)
class EqualCompute:
    """The baseline `other` that was trained with the FLOPs of `arm`. `passes` says how often it saw the data: at most 1 where every row
    that it saw was new."""

    arm: str
    other: str
    flops: float | None
    other_flops: float | None
    steps: float | None
    passes: float | None


def equal_compute(evidence: Evidence) -> list[EqualCompute]:
    """What was added to compare at equal compute, as far as it has run."""
    found = []
    for other, about in evidence.about.items():
        for arm in about.get("at_cost_of", []):
            ours, theirs = evidence.finished.get(arm, []), evidence.finished.get(other, [])
            if ours and theirs:
                batch_size, num_samples = theirs[0].recipe["train"]["batch_size"], theirs[0].data.get("num_samples")
                steps = _over_runs(theirs, "steps")
                passes = steps * batch_size / num_samples if steps and num_samples else None
                found.append(EqualCompute(arm, other, cost(ours)["flops"], cost(theirs)["flops"], steps, passes))
    return found


def cost_terms(evidence: Evidence, arm: str, other: str) -> str:
    """At what an arm is compared with the baseline, or with the baseline at its cost; nothing where the study does not ask for both."""
    if not evidence.judged.get("primary", {}).get("equal_compute"):
        return ""
    if arm in evidence.about.get(other, {}).get("at_cost_of", []):
        return "at equal compute"
    ours, theirs = (cost(evidence.finished.get(one, [])) for one in (arm, other))
    same = [name for key, name in (("tokens", "tokens"), ("flops", "compute")) if _close(ours[key], theirs[key])]
    return f"at equal {' and '.join(same)}" if same else "at other tokens and compute"


def _close(a: float | None, b: float | None) -> bool:
    """Equal to what the lengths of sentences make of it."""
    return a is not None and b is not None and abs(a - b) <= 0.02 * max(a, b)


def evaluation_seconds(evals: dict[str, dict[str, Any]]) -> float:
    return sum(result.get("seconds") or 0.0 for result in evals.values())


def _over_runs(runs: Sequence[RunRecord], key: str) -> float | None:
    return _mean([run.totals[key] for run in runs if run.totals.get(key) is not None])


def budgets(evidence: Evidence) -> list[Budget]:
    """What must be equal over the finished arms, seed by seed; an arm is not asked for what it changes by declaration."""
    found = []
    for seed in evidence.seeds:
        runs = {arm: run for arm, runs in evidence.finished.items() for run in runs if run.seed == seed}
        for field in BUDGETS if runs else ():
            asked = [arm for arm in runs if EXCUSED[field].isdisjoint(evidence.apart.get(arm, ()))]
            found.append(Budget(seed, field, {arm: _budget(runs[arm], field) for arm in asked}))
    return found


def _budget(run: RunRecord, field: str) -> Any:
    if field == "scored_tokens":
        return run.scored_tokens
    return run.totals.get(field) if field in ("steps", "tokens") else run.data.get(field)


def headroom(evidence: Evidence) -> list[Headroom]:
    """The teacher's NLL beside the students': on held-out text where that was measured, and on the last quarter of the training steps.

    Arms of one seed see the same batches, so the figures are over the same tokens.
    """
    return [*_heldout_headroom(evidence), *_training_headroom(evidence)]


def _heldout_headroom(evidence: Evidence) -> list[Headroom]:
    found = []
    for benchmark in dict.fromkeys(name for name, metric, _ in evidence.benchmarks() if metric == "nll"):
        scores = {arm: score([run.evals for run in runs], benchmark, "nll") for arm, runs in evidence.finished.items()}
        students = {arm: its.value for arm, its in scores.items() if its and its.value is not None}
        told = [score([run.evals for run in runs], benchmark, TEACHER_NLL) for runs in evidence.finished.values()]
        teacher = [its for its in told if its and its.value is not None]
        if students and teacher and teacher[0].value is not None:
            found.append(Headroom(f"On {teacher[0].num_items} held-out conversations ({benchmark})", teacher[0].value, students))
    return found


def _training_headroom(evidence: Evidence) -> list[Headroom]:
    runs = [run for arm in evidence.in_step for run in evidence.finished.get(arm, []) if run.metrics]
    told = [run for run in runs if TEACHER_NLL in run.metrics[-1]]
    learned = [run for run in runs if "loss/ce" in run.metrics[-1]]
    if not told or not learned:
        return []
    num_steps = max(min(len(run.metrics) for run in runs) // 4, 1)
    students = {run.arm: [_last(other, "loss/ce", num_steps) for other in learned if other.arm == run.arm] for run in learned}
    teachers = {
        name: [_last(run, TEACHER_NLL, num_steps) for run in told if evidence.teacher_of(run.arm) == name] for name in evidence.teachers
    }
    last = told[0].metrics[-num_steps:]
    span = last[-1]["step"] - last[0]["step"] + 1  # records keep the rows of some steps
    where = (
        "In the last training step" if span == 1 else f"In {f'{num_steps} of ' if span > num_steps else ''}the last {span} training steps"
    )
    means = {arm: spread(values).mean for arm, values in students.items()}
    return [Headroom(where, spread(values).mean, means, name) for name, values in teachers.items() if values]


def _last(run: RunRecord, key: str, num_steps: int) -> float:
    """Per scored token over the last steps."""
    rows = [row for row in run.metrics[-num_steps:] if key in row]
    total = sum(row[key] * row["scored_tokens"] for row in rows)
    return float(total / max(sum(row["scored_tokens"] for row in rows), 1))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def chosen(evidence: Evidence) -> dict[str, list[dict[str, Any]]]:
    """By arm and seed, the evaluation during training that was best, where that chose the student."""
    found = {arm: [run.totals["best"] for run in runs if run.totals.get("best")] for arm, runs in evidence.finished.items()}
    return {arm: its for arm, its in found.items() if its}
