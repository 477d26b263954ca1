"""Judge: what the declared protocol makes of the runs. Verdicts on the primary metric, the study's checks of itself, the gap recovered.

No words and no layout. `verdict` decides a comparison; here is only which runs are compared, and what the controls say of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.report.collect import Evidence, item_pairs
from limbeck.report.gap import Gap, gap_recovered
from limbeck.report.records import RunRecord
from limbeck.report.summary import comparable
from limbeck.report.verdict import Comparison, Run, Verdict, verdicts

State = Literal["sound", "void", "powerless", "unchecked"]


@dataclass(frozen=True)
class Judgement:
    """What was decided. `verdicts` is by (arm, with); `again` compares the A/A twin with the baseline, `planted` the handicapped arm."""

    benchmark: str
    metric: str
    higher_is_better: bool
    margin: float
    alpha: float
    verdicts: dict[tuple[str, str], Verdict]
    again: Verdict | None
    planted: Verdict | None
    gaps: dict[str, Gap]
    lacking: list[tuple[str, str]]
    """Pairs that are declared and of which runs are missing."""

    @property
    def state(self) -> State:
        """`void` where chance beats the baseline, `powerless` where the known handicap was not found, `unchecked` where controls lack."""
        if self.again is None or self.planted is None or "NO VERDICT" in (self.again.outcome, self.planted.outcome):
            return "unchecked"
        if self.again.outcome in ("BEATS", "LOSES"):
            return "void"
        return "sound" if self.planted.outcome == "LOSES" else "powerless"

    def to_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        return {
            **{name: getattr(self, name) for name in ("benchmark", "metric", "higher_is_better", "margin", "alpha", "state")},
            "comparisons": [{"arm": arm, "with": other, **asdict(its)} for (arm, other), its in self.verdicts.items()],
            "again": asdict(self.again) if self.again else None,
            "planted": asdict(self.planted) if self.planted else None,
            "gaps": {arm: asdict(gap) for arm, gap in self.gaps.items()},
        }


def judge(evidence: Evidence) -> Judgement | None:
    """The judgement by the protocol that holds; None where none was declared or nothing can be compared yet."""
    primary = evidence.judged.get("primary")
    baseline = evidence.baseline
    if not primary or baseline is None:
        return None
    benchmark = primary["benchmark"]
    examples = {(name, metric): example for name, metric, example in evidence.benchmarks()}
    metric = primary["metric"] or next((m for name, m in examples if name == benchmark), "")
    if (benchmark, metric) not in examples:
        return None
    up, margin, alpha = examples[benchmark, metric]["higher_is_better"], primary["margin"], primary["alpha"]
    finished = evidence.finished
    results = [run.evals[benchmark] for arm in (baseline, *finished) for run in finished.get(arm, []) if benchmark in run.evals]
    asked = results[0] if results else {}
    runs = {arm: measured for arm, its in finished.items() if (measured := _by_seed(its, benchmark, metric, asked))}
    pairs = [(arm, other) for arm, other in evidence.judged["compared"]]
    matched = {pair: _matched(runs.get(pair[0], {}), runs.get(pair[1], {}), up) for pair in pairs}
    ready = {f"{arm} and {other}": (arm, other) for (arm, other), its in matched.items() if its.ours}

    def control(role: str) -> Verdict | None:
        its = _matched(runs.get(evidence.of_role(role) or "", {}), runs.get(baseline, {}), up)
        return verdicts({role: its}, margin, alpha)[role] if its.ours else None

    found = verdicts({name: matched[pair] for name, pair in ready.items()}, margin, alpha) if ready else {}
    gaps = {}
    for arm in runs:
        its_teacher = evidence.references.get(evidence.teacher_of(arm), {})
        teacher = item_pairs(its_teacher, benchmark, metric)
        if not teacher or not comparable(its_teacher[benchmark], asked):
            continue
        its = _matched(runs[arm], runs.get(baseline, {}), up)
        if its.ours and its.is_paired and arm != baseline and evidence.about.get(arm, {}).get("role", "arm") == "arm":
            gaps[arm] = gap_recovered(its.ours, its.theirs, teacher, up, alpha)
    return Judgement(
        benchmark,
        metric,
        up,
        margin,
        alpha,
        {pair: found[name] for name, pair in ready.items()},
        control("again"),
        control("planted"),
        gaps,
        [pair for pair in pairs if pair not in ready.values()],
    )


def _by_seed(runs: Sequence[RunRecord], benchmark: str, metric: str, asked: dict[str, Any]) -> dict[int, Run]:
    """The items of every run that was measured so, by seed in the order of the seeds. A study that goes on after its cases were edited has
    runs that were `asked` others."""
    same = [run for run in runs if comparable(run.evals.get(benchmark, {}), asked)]
    found: dict[int, Run] = {run.seed: item_pairs(run.evals, benchmark, metric) for run in same}
    return {seed: items for seed, items in found.items() if items}


def _matched(ours: Mapping[int, Run], theirs: Mapping[int, Run], up: bool) -> Comparison:
    """Runs of the seeds that both have, in pairs; of an A/A twin, which shares none, as many as there are of the other, and no pairs."""
    if shared := [seed for seed in ours if seed in theirs]:
        return Comparison([ours[seed] for seed in shared], [theirs[seed] for seed in shared], up)
    count = min(len(ours), len(theirs))
    return Comparison(list(ours.values())[:count], list(theirs.values())[:count], up, is_paired=False)


@dataclass(frozen=True)
class Forgotten:
    """Items of a task that the student got right before training: how many are still right, and how many are right that were not."""

    benchmark: str
    metric: str
    arm: str
    before: int
    kept: float
    gained: float
    num_items: int


def forgotten(evidence: Evidence) -> list[Forgotten]:
    """What every arm kept of what the student could do before, over right-or-wrong items; means over seeds."""
    untrained = evidence.references.get("untrained", {})
    found = []
    for benchmark, metric, _ in evidence.headlines():
        before = item_pairs(untrained, benchmark, metric)
        if evidence.is_text(benchmark) or not _is_binary(before):
            continue
        right = {item for item, (total, _) in before.items() if total}
        for arm, runs in evidence.finished.items():
            seeds = [items for run in runs if _is_binary(items := item_pairs(run.evals, benchmark, metric))]
            if seeds and evidence.about.get(arm, {}).get("role", "arm") == "arm":
                kept = [sum(bool(items[item][0]) for item in right if item in items) for items in seeds]
                gained = [sum(bool(total) for item, (total, _) in items.items() if item not in right) for items in seeds]
                found.append(Forgotten(benchmark, metric, arm, len(right), sum(kept) / len(seeds), sum(gained) / len(seeds), len(before)))
    return found


def _is_binary(items: Mapping[str, tuple[float, float]]) -> bool:
    return bool(items) and all(count == 1 and total in (0, 1) for total, count in items.values())
