"""Records: what stays of a finished run. Recipe, hashes, learning curve, costs and scores per item, in one small JSON file.

A record is named after its content (arm, seed and the hash of all that decides the run's result), so a study skips what is recorded, and
with the records copied or committed it goes on on another machine. It holds no weights and no text of the data, but a few answers to
questions that anybody may print.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from limbeck.errors import RunError
from limbeck.evaluate.base import Result, types_of
from limbeck.run import Run, write_json

FOLDER = "records"
CURVE_POINTS = 200
NUM_ANSWERS = 12
PRINTABLE = {"exact_match", "function_calling"}
"""Benchmarks whose questions are generated or under a plain licence: answers to a few of them are kept, for people to read."""
_CURVE = ("step", "loss", "tokens", "scored_tokens", "seconds", "teacher_nll", "learning_rate")


@dataclass(frozen=True)
class RunRecord:
    """One run as it lies on disk, in its directory or as a record. `totals` is its run.json. `key` is empty where there is no record."""

    arm: str
    seed: int
    recipe: dict[str, Any]
    totals: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evals: dict[str, dict[str, Any]]
    key: str = ""
    teacher: str = ""
    """Hash of the teacher that benchmarks compared with, as it was captured."""
    about: dict[str, Any] = field(default_factory=dict)
    """Costs that no run.json has: `flops`, and those of `parent`."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Those during training."""

    @property
    def is_finished(self) -> bool:
        return self.totals.get("status") == "finished"

    @property
    def scored_tokens(self) -> int:
        """Scored tokens trained on."""
        return int(self.totals.get("scored_tokens") or sum(row["scored_tokens"] for row in self.metrics))


def of_run(path: Path, arm: str, seed: int) -> RunRecord:
    """What lies in a run's directory."""
    run = Run(path)
    return RunRecord(
        arm=arm,
        seed=seed,
        recipe=run.read_json("recipe.json", {}),
        totals=run.read_json("run.json", {}),
        data=run.read_json("data.json", {}),
        environment=run.read_json("environment.json", {}),
        metrics=[row for row in run.metrics() if {"step", "loss", "scored_tokens"} <= set(row)],
        evals=checked(run.evals(), run.path / "evals"),
        evaluations=[row for row in run.evaluations() if {"step", "metrics"} <= set(row)],
    )


def checked(evals: dict[str, dict[str, Any]], where: Path) -> dict[str, dict[str, Any]]:
    """Results by benchmark; RunError where one is none."""
    for name, result in evals.items():
        Result.from_json(result, str(where / f"{name}.json"))
    return evals


def write_record(file: Path, record: RunRecord) -> None:
    """The record as a file: curves thinned, items without their texts."""
    tree = {
        "format": "limbeck-record",
        "version": 1,
        **{name: getattr(record, name) for name in ("arm", "seed", "key", "teacher", "about", "recipe", "totals", "data")},
        "environment": {key: value for key, value in record.environment.items() if key != "command"},
        "metrics": [_curve(row) for row in _thinned(record.metrics)],
        "evals": {name: _without_texts(result) for name, result in record.evals.items()},
        **({"evaluations": _thinned(record.evaluations)} if record.evaluations else {}),
    }
    write_json(file, tree, indent=None)


def read_record(file: Path) -> RunRecord:
    """The inverse of `write_record`; RunError where the file is no record."""
    tree = Run(file.parent).read_json(file.name)
    if not isinstance(tree, dict) or tree.get("format") != "limbeck-record" or tree.get("version") != 1:
        raise RunError(f"{file}: no record of a run as this version of Limbeck writes it; delete it, and the run is made again")
    parts = {name: value for name, value in tree.items() if name not in ("format", "version")}
    try:
        record = RunRecord(**parts)  # which knows no other parts
        types_of(RunRecord).validate_python(parts)
    except (TypeError, ValidationError) as error:
        raise RunError(f"{file}: no record of a run: {' '.join(str(error).split())[:200]}") from None
    checked(record.evals, file)
    return record


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most CURVE_POINTS rows, the first and the last among them."""
    if len(rows) <= CURVE_POINTS:
        return rows
    last = len(rows) - 1
    return [rows[round(i * last / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]


def _curve(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key in _CURVE or key.startswith(("loss/", "weight/", "temperature/"))}
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in kept.items()}


def _without_texts(result: dict[str, Any]) -> dict[str, Any]:
    shown = NUM_ANSWERS if result["settings"].get("type") in PRINTABLE else 0
    ids = sorted(item["id"] for item in result["items"])[:shown]
    items = [item | {"detail": item["detail"] if item["id"] in ids else {}} for item in result["items"]]
    return result | {"items": [{key: value for key, value in item.items() if value or key != "detail"} for item in items]}
