"""Forecast: what a study will take before it is started, each arm as `limbeck plan` counts it; time is that of runs that are recorded, or
estimated from a matrix product that is timed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.conduct import require_files_of_arms
from limbeck.flops import asks_teacher
from limbeck.ledger import Ledger, Task
from limbeck.log import console, megabytes, say
from limbeck.plan import plan
from limbeck.report.records import read_record
from limbeck.study import Study

MB = 2**20


def forecast(study: Study, path: Path | str, results: Path | str | None = None) -> dict[str, Any]:
    """A row per run that is left, and their sum. Loads tokenizers and shapes, no weights."""
    ledger = Ledger(study, path, results)
    require_files_of_arms(ledger)
    every = [*ledger.tuning_tasks(), *ledger.tasks()]
    tasks = [task for task in every if ledger.recorded(task) is None]
    planned = {arm: plan(ledger.arms[arm].recipe, advise=False) for arm in dict.fromkeys(task.arm for task in tasks)}
    rows = [_expected(ledger, task, planned[task.arm]) for task in tasks]
    return {
        "name": study.name,
        "runs": rows,
        "num_runs": len(rows),
        "num_recorded": len(every) - len(tasks),
        "tokens": sum(row["tokens"] for row in rows),
        "train_seconds": sum(row["train_seconds"] for row in rows),
        "evaluation_seconds": _evaluation(ledger, every, tasks),
        "memory_mb": max((row["memory_mb"] for row in rows), default=0.0),
        "disk_mb": sum(row["disk_mb"] for row in rows),
    }


def show(expected: dict[str, Any]) -> None:
    """The forecast on the terminal, arms with equal figures in one row."""
    from rich.table import Table

    table = Table("arm", "runs", "tokens each", "minutes each", "from", "memory, MB", box=None)
    for arm in dict.fromkeys(row["arm"] for row in expected["runs"]):
        rows = [row for row in expected["runs"] if row["arm"] == arm]
        first, minutes = rows[0], f"{rows[0]['train_seconds'] / 60:.1f}"
        table.add_row(arm, str(len(rows)), f"{first['tokens']:,}", minutes, first["basis"], f"{first['memory_mb']:,.0f}")
    console.print(table)
    graded = expected["evaluation_seconds"]
    beside = (
        " beside capture and evaluations"
        if graded is None
        else f" and {graded / 60:.0f} of their evaluation, as recorded, beside capture and references"
    )
    say(
        f"{expected['num_runs']} runs to make, {expected['num_recorded']} recorded: {expected['tokens']:,} tokens, about "
        f"{expected['train_seconds'] / 60:.0f} minutes of training{beside}, "
        f"{megabytes(expected['disk_mb'] * MB)} MB of students"
    )


def _evaluation(ledger: Ledger, every: list[Task], left: list[Task]) -> float | None:
    """Seconds, if a run that is left takes what recorded ones of its kind took on the mean; None where one has none to go by."""
    recorded = [(task.is_tuning, record) for task in every if (record := ledger.recorded(task)) is not None]
    total = 0.0
    for task in left:
        took = [sum(its["seconds"] for its in record.evals.values()) for is_tuning, record in recorded if is_tuning == task.is_tuning]
        if not took:
            return None
        total += sum(took) / len(took)
    return total


def _expected(ledger: Ledger, task: Task, planned: dict[str, Any]) -> dict[str, Any]:
    recipe = ledger.arms[task.arm].recipe
    like = [read_record(ledger.file(other)) for other in ledger.tasks() if other.arm == task.arm and ledger.file(other).is_file()]
    memory, share = planned["peak"], 1.0
    if ledger.study.capture:  # a captured teacher is read, and neither here nor run
        memory -= planned["memory"]["teacher"]
        share -= planned["teacher_flops"] / planned["flops"]
    seconds, basis = planned["seconds"] * share, "a timed matrix product"
    if like:
        seconds, basis = planned["tokens"] / like[0].totals["tokens_per_second"], "a recorded run"
    return {
        "arm": task.arm,
        "seed": task.seed,
        "learning_rate": task.rate,
        "is_tuning": task.is_tuning,
        "tokens": planned["tokens"],
        "asks_teacher": asks_teacher(recipe),
        "train_seconds": seconds,
        "basis": basis,
        "memory_mb": like[0].totals["peak_memory_mb"] if like else memory / MB,
        "disk_mb": planned["disk"]["student"] / MB,
    }
