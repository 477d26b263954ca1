"""Bookkeeping: what training writes into a run's directory, but for weights. Rank 0 does it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from limbeck import adapters
from limbeck.errors import RunError
from limbeck.inputs import inputs_of
from limbeck.log import peak_memory_mb
from limbeck.models import weights_hash
from limbeck.objectives.base import Term, gates
from limbeck.recipe import Recipe
from limbeck.run import Run, appearing, complete_lines, differences, environment, what_is_learned
from limbeck.sources.base import OpenSource
from limbeck.step import StepResult
from limbeck.tokens.identity import template_hash, vocabulary_hash


def refuse_others(run: Run, recipe: Recipe) -> None:
    """Refuse the directory of another recipe, or of something else."""
    if (run.path / "recipe.json").is_file():
        if differing := differences(what_is_learned(run.read_json("recipe.json")), what_is_learned(recipe.to_json())):
            others = "" if len(differing) == 1 else f", and {len(differing) - 1} more"
            raise RunError(
                f"{run.path}: holds a run of another recipe ({differing[0][1]}{others}); choose another run directory, or delete this one"
            )
        if changed := changed_inputs(run, recipe):
            raise RunError(f"{run.path}: {changed} since this run began; choose another run directory, or delete this one")
        return
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise RunError(f"{run.path}: exists and is no run directory; choose another path")


def changed_inputs(run: Run, recipe: Recipe) -> str:
    """What lies behind the names in a run's recipe and is not what it was when the run began, in words; empty where all is."""
    before = run.read_json("data.json", {}).get("inputs")
    if before is None or not (differing := [key for key, _ in differences(before, inputs_of(recipe))]):
        return ""
    names = {"data": "the files of source.data", "models.student": "student.model", "models.teacher": "the teacher"}
    names["chosen_by"] = "the cases of train.best.benchmark"
    return " and ".join(f"{names.get(key, key)} changed" for key in differing)


def describe(
    run: Run, recipe: Recipe, source: OpenSource, student: Any, tokenizer: Any, num_steps: int, layer_maps: dict[str, Any]
) -> None:
    """Take the directory, now that everything has loaded, and say what is trained on and what it starts from (data.json): two runs with
    equal hashes had equal budgets."""
    _, spec = recipe.for_training()
    initial = weights_hash(adapters.base_weights(student))
    before = run.read_json("data.json", {}).get("initial_weights_sha256", initial)
    if before != initial:
        raise RunError(f"{run.path}: began with a student of weights {before[:12]}, found {initial[:12]}; choose another run directory")
    run.write_json("recipe.json", recipe.to_json())
    run.write_json("environment.json", environment())
    run.write_json("run.json", {"status": "running"})
    order = hashlib.sha256()
    for step in range(num_steps):
        order.update(" ".join(str(sample.sample_id) for sample in source.at(step, spec.batch_size)).encode())
    run.write_json(
        "data.json",
        {
            **source.describe(),
            "num_steps": num_steps,
            **({"layer_maps": layer_maps} if layer_maps else {}),
            "inputs": inputs_of(recipe),
            "order_sha256": order.hexdigest(),
            "initial_weights_sha256": initial,
            "vocabulary_sha256": vocabulary_hash(tokenizer),
            "template_sha256": template_hash(tokenizer),
        },
    )


def log_step(
    run: Run,
    step: int,
    result: StepResult,
    terms: Mapping[str, Term],
    scheduled: Mapping[str, float],
    rate: float,
    tokens: int,
    seconds: float,
    spent: float,
    is_skipped: bool,
) -> dict[str, Any]:
    """One line of metrics.jsonl: means per token of what was optimised, over all processes, and what schedules made of it. A step that was
    skipped has those of its numbers that are one."""
    row: dict[str, Any] = {"step": step, "loss": result.loss}
    row.update({f"loss/{key}": result.sums[key] / max(result.counts[term.count], 1) for key, term in terms.items()})
    row.update({key: result.sums[key] / max(result.counts["scored"], 1) for key in gates(terms)})
    if result.sums["teacher_nll"]:
        row["teacher_nll"] = result.sums["teacher_nll"] / max(result.counts["scored"], 1)
    row.update(scheduled)
    row.update(
        learning_rate=rate,
        grad_norm=result.grad_norm,
        tokens=tokens,
        scored_tokens=int(result.counts["scored"]),
        tokens_per_second=result.counts["represented"] / seconds,
        teacher_share=result.teacher_seconds / seconds,
        peak_memory_mb=peak_memory_mb(),
        seconds=spent,
    )
    if is_skipped:
        row = {key: value for key, value in row.items() if math.isfinite(value)} | {"skipped": 1}
    append(run.metrics_file, row)
    return row


def append(file: Path, row: Mapping[str, Any]) -> None:
    """One more object in a file of JSON lines."""
    try:
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    except OSError as error:  # half a line at the end counts for nothing
        raise RunError(f"{file}: could not be written ({error}); start the same command again to go on") from error


def forget(file: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop rows of a file of JSON lines, such as those of steps that a resume will do again; those that are kept."""
    rows = [row for row in complete_lines(file) if keep(row)]
    try:
        with appearing(file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise RunError(f"{file}: could not be written ({error})") from error
    return rows
