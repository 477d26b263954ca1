"""Evidence: what lies in the directory of a study, or of a single run, read once. Nothing is computed here and nothing written.

study.json            name, question, seeds, and every arm's resolved recipe     arms/ARM/seed-N/         a run each
capture.json          what the capture took                                      references/NAME/evals/   teacher and untrained student
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.errors import RunError
from limbeck.evaluate.base import Result
from limbeck.report.stats import Pair
from limbeck.run import Run

TEACHER_NLL = "teacher_nll"
"""A metric that says nothing of the model that was graded: it is kept for the comparison with the teacher, and out of the tables."""

REFERENCES = {"teacher": "teacher", "untrained": "untrained"}
"""Rows that are no arms: folder below `references/`, and label."""


@dataclass(frozen=True)
class RunRecord:
    """One run as it lies on disk. `totals` is its run.json."""

    arm: str
    seed: int
    recipe: dict[str, Any]
    totals: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evals: dict[str, dict[str, Any]]

    @property
    def is_finished(self) -> bool:
        return self.totals.get("status") == "finished"


@dataclass(frozen=True)
class Evidence:
    """A study's or a run's directory. `arms` holds the runs that were started, by arm and then by seed."""

    path: Path
    is_study: bool
    name: str
    question: str
    seeds: list[int]
    recipes: dict[str, dict[str, Any]]
    arms: dict[str, list[RunRecord]]
    references: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    capture: dict[str, Any] | None = None

    @property
    def finished(self) -> dict[str, list[RunRecord]]:
        """Finished runs by arm; an arm without one is left out."""
        found = {arm: [run for run in runs if run.is_finished] for arm, runs in self.arms.items()}
        return {arm: runs for arm, runs in found.items() if runs}

    @property
    def num_expected(self) -> int:
        return len(self.recipes) * len(self.seeds)

    @property
    def num_finished(self) -> int:
        return sum(map(len, self.finished.values()))

    @property
    def baseline(self) -> str | None:
        """The arm that the others are compared with: the first that is plain fine-tuning (cross-entropy alone), else the first."""
        plain = [arm for arm, recipe in self.recipes.items() if [term["type"] for term in terms(recipe)] == ["ce"]]
        return (plain or list(self.recipes))[0] if len(self.recipes) > 1 else None

    def is_text(self, benchmark: str) -> bool:
        """Whether a benchmark measures likeness on held-out text, which is near what arms optimise, and no task."""
        types = {b.get("name") or b["type"]: b["type"] for recipe in self.recipes.values() for b in recipe.get("evaluate", [])}
        return types.get(benchmark, benchmark) in ("agreement", "bits_per_byte")

    def models(self) -> Iterator[tuple[str, list[dict[str, dict[str, Any]]]]]:
        """(label, evals per seed) of everything that was measured: references first, then arms."""
        for name, label in REFERENCES.items():
            if self.references.get(name):
                yield label, [self.references[name]]
        for arm, runs in self.finished.items():
            if any(run.evals for run in runs):
                yield arm, [run.evals for run in runs]

    def benchmarks(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(benchmark, metric, an example of it) of all that was measured, in the recipe's order."""
        order = [b.get("name") or b["type"] for recipe in self.recipes.values() for b in recipe.get("evaluate", [])]
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for _, per_seed in self.models():
            for evals in per_seed:
                for name in sorted(evals, key=lambda name: order.index(name) if name in order else len(order)):
                    for metric, value in evals[name]["metrics"].items():
                        found.setdefault((name, metric), value)
        return [(name, metric, example) for (name, metric), example in found.items() if metric != TEACHER_NLL]

    def headlines(self) -> list[tuple[str, str, dict[str, Any]]]:
        """The first metric of each benchmark: what plots and summaries show; tables have all."""
        first: dict[str, tuple[str, str, dict[str, Any]]] = {}
        for entry in self.benchmarks():
            first.setdefault(entry[0], entry)
        return list(first.values())


def collect(path: Path) -> Evidence:
    """The evidence in a study's or a run's directory."""
    here = Run(path)
    if (path / "study.json").is_file():
        return _study(here)
    if (path / "recipe.json").is_file():
        recipe = here.read_json("recipe.json")
        record = _record(path, path.name, recipe.get("seed", 0))
        return Evidence(path, False, path.name, "", [record.seed], {record.arm: recipe}, {record.arm: [record]})
    what = "found no study.json or recipe.json" if path.is_dir() else "no such directory"
    raise RunError(f"{path}: {what}, expected the directory of a study or a run")


def _study(here: Run) -> Evidence:
    study = here.read_json("study.json")
    if lacking := [key for key in ("name", "seeds", "recipes") if key not in study]:
        raise RunError(f"{here.path / 'study.json'}: found no {lacking[0]!r}, expected a file written by `limbeck study`")
    arms = {
        arm: [
            _record(folder, arm, seed)
            for seed in study["seeds"]
            if ((folder := here.path / "arms" / arm / f"seed-{seed}") / "recipe.json").is_file()
        ]
        for arm in study["recipes"]
    }
    return Evidence(
        path=here.path,
        is_study=True,
        name=study["name"],
        question=study.get("question", ""),
        seeds=study["seeds"],
        recipes=study["recipes"],
        arms=arms,
        references={name: _evals(Run(here.path / "references" / name)) for name in REFERENCES} if study.get("references") else {},
        capture=here.read_json("capture.json", {}) or None,
    )


def _record(path: Path, arm: str, seed: int) -> RunRecord:
    run = Run(path)
    return RunRecord(
        arm=arm,
        seed=seed,
        recipe=run.read_json("recipe.json"),
        totals=run.read_json("run.json", {}),
        data=run.read_json("data.json", {}),
        environment=run.read_json("environment.json", {}),
        metrics=[row for row in run.metrics() if {"step", "loss", "scored_tokens"} <= set(row)],
        evals=_evals(run),
    )


def _evals(run: Run) -> dict[str, dict[str, Any]]:
    """Results by benchmark; RunError where a file is none."""
    found = run.evals()
    for name, result in found.items():
        Result.from_json(result, str(run.path / "evals" / f"{name}.json"))
    return found


def terms(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The terms of a stored recipe that have a weight."""
    return [term for term in recipe.get("objective", []) if term.get("weight", 1.0) != 0]


def objective_text(recipe: dict[str, Any]) -> str:
    """A stored objective in a line: `ce + 0.5 logits (forward_kl, T 2)`, `logits (jsd, beta 0.1)`."""
    parts = []
    for term in terms(recipe):
        details = [named(term[key]) for key in ("divergence", "measure") if term.get(key)]
        if term.get("trust_threshold"):
            details.append(f"trusted from {term['trust_threshold']:g}")
        if term.get("temperature", 1.0) != 1.0:
            details.append(f"T {_amount(term['temperature'])}")
        weight = "" if term.get("weight", 1.0) == 1.0 else f"{_amount(term['weight'])} "
        parts.append(f"{weight}{term['type']}" + (f" ({', '.join(details)})" if details else ""))
    return " + ".join(parts) or "none"


def _amount(value: Any) -> str:
    """A number, or the ends of a schedule: `1 to 0.2`."""
    return f"{value['start']:g} to {value['end']:g}" if isinstance(value, dict) else f"{value:g}"


def named(value: Any) -> str:
    """A member of a family as it was stored: its name, and its parameters where it has some."""
    if not isinstance(value, dict):
        return str(value)
    knobs = [f"{key} {knob:g}" for key, knob in value.items() if isinstance(knob, int | float) and not isinstance(knob, bool)]
    return ", ".join([str(value["type"]), *knobs, *(key for key, knob in value.items() if knob is True)])


def item_pairs(evals: dict[str, dict[str, Any]], benchmark: str, metric: str) -> dict[str, Pair]:
    """(sum, count) by item id of a metric; empty where the benchmark or the metric keeps none per item."""
    items = evals.get(benchmark, {}).get("items", [])
    return {item["id"]: (item["sums"][metric], item["counts"][metric]) for item in items if metric in item["sums"]}
