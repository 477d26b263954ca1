"""Milestones: evaluations during training, and the best of the students that they saw.

evaluations.jsonl        one object per evaluation: step, seconds, metrics by benchmark
evals/step-00000050/     its results, with every item       best/step-00000050/   weights that were the best until then, as a checkpoint

An evaluation is due after 0, N, 2N, ... steps and after the last, behind the checkpoint of its step, and is made where evaluations.jsonl
does not have it: a run that was stopped in one goes on with it. Rank 0 grades, the others wait. Every folder of best/ was better than all
before it, so that the newest is the best; older ones stay for as long as a kept checkpoint lies before the next.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from limbeck import bookkeeping, checkpoint, distributed, not_finite, stopping
from limbeck.distributed import World
from limbeck.divide import whole_student
from limbeck.errors import RunError, nearest
from limbeck.evaluate import Subject
from limbeck.evaluate.runner import evaluate
from limbeck.log import say, warn
from limbeck.recipe import Recipe
from limbeck.run import Run


class Milestones:
    """The evaluations of one run. Every process calls every method; without `train.evaluate_every` they do nothing."""

    def __init__(self, run: Run, recipe: Recipe, learner: Any, tokenizer: Any, num_steps: int, world: World) -> None:
        self.run, self.recipe, self.learner, self.tokenizer, self.world = run, recipe, learner, tokenizer, world
        _, self.spec = recipe.for_training()
        every = self.spec.evaluate_every
        self.due = {*range(0, num_steps, every), num_steps} if every else set()
        self.num_steps = num_steps
        self.best: dict[str, Any] | None = None
        """Step, benchmark, metric and value of the best so far."""
        self._made: set[int] = set()

    def begin(self, first: int) -> None:
        """Forget what lies behind the step with which a run begins or goes on."""
        if not self.due:
            return
        rows, kept = distributed.of_all(self._forget(first) if self.world.is_main else None, self.world)[0] or ([], None)
        self._made = {row["step"] for row in rows}
        if kept is not None:
            folder = self.run.best / checkpoint.name_of(kept)
            checkpoint.refuse_damaged(folder, self.world, "without it")
            self.best = self._judged(next(row for row in rows if row["step"] == kept))[0]

    def _forget(self, first: int) -> tuple[list[dict[str, Any]], int | None]:
        """The evaluations that stand, and the step of the best of them. Where weights are wanted and none are there, this step's is made
        again."""
        checkpoint.clean(self.run.best)
        rows = bookkeeping.forget(self.run.evaluations_file, lambda row: row["step"] <= first)
        known = {row["step"] for row in rows}
        for step in checkpoint.steps(self.run.best):
            if step not in known:
                checkpoint.remove(self.run.best / checkpoint.name_of(step))
        there = checkpoint.steps(self.run.best)
        if self.spec.best is not None and not there:
            rows = bookkeeping.forget(self.run.evaluations_file, lambda row: row["step"] < first)
        return rows, there[0] if there else None

    def reach(self, step: int) -> dict[str, Any] | None:
        """Evaluate after so many steps, where that is due; the row for trackers. Raises Stopped, on all ranks alike."""
        if step not in self.due or step in self._made:
            return None
        not_finite.refuse_weights(self.learner, self.world, self.run.path, step)
        student = whole_student(self.recipe, self.learner, self.world)
        row = distributed.of_all(self._graded(student, step) if self.world.is_main else None, self.world)[0]
        del student
        if row is None:
            raise stopping.Stopped
        if self.spec.best is not None:
            found, is_more = self._judged(row)
            if self.best is None or (found["value"] > self.best["value"] if is_more else found["value"] < self.best["value"]):
                checkpoint.save(self.run.best, step, self.learner, None, found, sys.maxsize, self.world)
                self.best = found
                say(f"{self.run.path}: after step {step} the best so far, {_said(found)}")
        if self.world.is_main:
            bookkeeping.append(self.run.evaluations_file, row)
            self._thin()
        self._made.add(step)
        return {"step": step} | {
            f"eval/{name}/{metric}": its["value"]
            for name, metrics in row["metrics"].items()
            for metric, its in metrics.items()
            if its["value"] is not None
        }

    def _graded(self, student: Any, step: int) -> dict[str, Any] | None:
        """The row of an evaluation; None where the process was told to stop. What is graded then is on the disk."""
        folder, results = self.run.evals_after(step), []
        subject = Subject(student, self.tokenizer, self.world.device, self.recipe.teacher)
        say(f"{self.run.path}: evaluating after step {step} of {self.num_steps}")
        try:
            with stopping.at_once():
                for result in evaluate(self.recipe.during, subject, folder):
                    self.run.write_json(f"evals/{folder.name}/{result.name}.json", result.to_json())
                    results.append(result)
        except stopping.Stopped:
            return None
        metrics = {result.name: {name: asdict(metric) for name, metric in result.metrics.items()} for result in results}
        return {"step": step, "seconds": round(sum(result.seconds for result in results), 3), "metrics": metrics}

    def _judged(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """What chooses, as it is in a row, and whether more of it is better."""
        assert self.spec.best is not None
        benchmark, metrics = self.spec.best.benchmark, row["metrics"][self.spec.best.benchmark]
        metric = self.spec.best.metric or next(iter(metrics))
        if metric not in metrics:
            raise RunError(
                f"train.best.metric: found {metric!r}, expected a metric of {benchmark!r}: {', '.join(metrics)}{nearest(metric, metrics)}"
            )
        if metrics[metric]["value"] is None:
            raise RunError(f"train.best.metric: no item of {benchmark!r} counts for {metric!r}, so nothing can be chosen by it")
        found = {"step": row["step"], "benchmark": benchmark, "metric": metric, "value": metrics[metric]["value"]}
        return found, metrics[metric]["higher_is_better"]

    def _thin(self) -> None:
        """Keep the best as it is now, and as it was at each checkpoint that a resume may begin with."""
        there = checkpoint.steps(self.run.best)
        ends = [sys.maxsize, *checkpoint.steps(self.run.checkpoints)]
        needed = {next((step for step in there if step <= end), None) for end in ends}
        for step in there:
            if step not in needed:
                checkpoint.remove(self.run.best / checkpoint.name_of(step))

    def take_best(self) -> None:
        """Give the learner the weights that were best."""
        if self.best is None or self.best["step"] == self.num_steps:
            return
        if self.best["step"] == 0:
            warn(f"{self.run.path}: no evaluation was better than that before the first step, so the student is the untrained one")
        checkpoint.load_latest(self.run.best, self.learner, None, self.world)
        say(f"{self.run.path}: the student is that after step {self.best['step']} of {self.num_steps}, {_said(self.best)}")


def _said(best: Mapping[str, Any]) -> str:
    return f"{' '.join(dict.fromkeys((best['benchmark'], best['metric'])))} {best['value']:.4g}"
