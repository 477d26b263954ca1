"""Forecast: what a study will take before it is started. Runs, tokens and bytes are counted; time is taken from runs that are recorded, or
estimated from a matrix product that is timed here."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from limbeck.flops import asks_teacher, flops_per_token
from limbeck.ledger import Ledger, Task
from limbeck.log import console, megabytes, say
from limbeck.report.records import read_record
from limbeck.study import Study

EFFICIENCY = 0.5
"""Share of the speed of a bare matrix product that a training step reaches."""
RECORDED = "a recorded run"
"""What a forecast is taken from, where there is one."""
BYTES_PER_TRAINED = 16
"""Weight, gradient and two moments of AdamW in float32."""


def forecast(study: Study, path: Path | str, results: Path | str | None = None) -> dict[str, Any]:
    """A row per run that is left, and their sum. Loads tokenizers, no model."""
    ledger = Ledger(study, path, results)
    speed = flops_per_second()
    every = [*ledger.tuning_tasks(), *ledger.tasks()]
    tasks = [task for task in every if ledger.recorded(task) is None]
    tokens = {arm: _tokens(ledger, arm) for arm in dict.fromkeys(task.arm for task in tasks)}
    rows = [_expected(ledger, task, tokens[task.arm], speed) for task in tasks]
    return {
        "name": study.name,
        "runs": rows,
        "num_runs": len(rows),
        "num_recorded": len(every) - len(tasks),
        "tokens": sum(row["tokens"] for row in rows),
        "train_seconds": sum(row["train_seconds"] or 0.0 for row in rows),
        "memory_mb": max((row["memory_mb"] for row in rows), default=0.0),
        "disk_mb": sum(row["disk_mb"] for row in rows),
    }


def show(expected: dict[str, Any]) -> None:
    """The forecast on the terminal, arms with equal figures in one row."""
    from rich.table import Table

    table = Table("arm", "runs", "tokens each", "minutes each", "from", "memory, MB", box=None)
    for arm in dict.fromkeys(row["arm"] for row in expected["runs"]):
        rows = [row for row in expected["runs"] if row["arm"] == arm]
        minutes = f"{rows[0]['train_seconds'] / 60:.1f}" if rows[0]["train_seconds"] is not None else "–"
        least = "" if rows[0]["basis"] == RECORDED else "over "  # activations and libraries come on top
        table.add_row(arm, str(len(rows)), f"{rows[0]['tokens']:,}", minutes, rows[0]["basis"], f"{least}{rows[0]['memory_mb']:,.0f}")
    console.print(table)
    say(
        f"{expected['num_runs']} runs to make, {expected['num_recorded']} recorded: {expected['tokens']:,} tokens, about "
        f"{expected['train_seconds'] / 60:.0f} minutes of training beside capture and evaluation, "
        f"{megabytes(expected['disk_mb'] * 2**20)} MB of students"
    )


def _tokens(ledger: Ledger, arm: str) -> int:
    """Tokens that a run of the arm trains on: those of its first seed, step by step."""
    from limbeck.models import load_tokenizer

    recipe = ledger.arms[arm].recipe
    student, train = recipe.for_training()
    source = recipe.source.open(load_tokenizer(student.model, student.revision), recipe.seed)
    num_steps = train.steps or math.ceil((train.epochs or 1) * source.steps_per_epoch(train.batch_size))
    return sum(len(sample.ids) for step in range(num_steps) for sample in source.at(step, train.batch_size))


def _expected(ledger: Ledger, task: Task, tokens: int, speed: float) -> dict[str, Any]:
    recipe = ledger.arms[task.arm].recipe
    student, train = recipe.for_training()
    like = [read_record(ledger.file(other)) for other in ledger.tasks() if other.arm == task.arm and ledger.file(other).is_file()]
    sizes = student.num_parameters()
    per_token = flops_per_token(recipe)
    if like:
        seconds, basis = tokens / like[0].totals["tokens_per_second"], RECORDED
    elif per_token["student"] is None:
        seconds, basis = None, "sizes are not known before the model is there"
    else:
        # a captured teacher is read and not run
        live = 0.0 if ledger.study.capture else per_token["teacher"] or 0.0
        seconds, basis = tokens * (per_token["student"] + live) / (speed * EFFICIENCY), "a timed matrix product"
    memory = like[0].totals["peak_memory_mb"] if like else _memory(sizes, train.head_memory_mb)
    own = sum(sizes.values()) if sizes else 0
    return {
        "arm": task.arm,
        "seed": task.seed,
        "learning_rate": task.rate,
        "is_tuning": task.is_tuning,
        "tokens": tokens,
        "asks_teacher": asks_teacher(recipe),
        "train_seconds": seconds,
        "basis": basis,
        "memory_mb": memory,
        "disk_mb": 4 * own / 2**20,
    }


def _memory(sizes: dict[str, int] | None, head_memory_mb: int) -> float:
    """Weights, gradients and moments, and the head's chunks; activations come on top."""
    if sizes is None:
        return 0.0
    return (BYTES_PER_TRAINED * sizes["trained"] + 4 * sizes["frozen"]) / 2**20 + head_memory_mb


def flops_per_second() -> float:
    """Of a bare float32 matrix product on this machine's default device, the best of three."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
