"""Ledger: which runs a study has, what decides each of them, and what is recorded of them. It trains and writes nothing but the index.

A run is known by the hash of all that decides its result (`key`), so a changed arm runs again and no other does, a benchmark that is added
is measured alone, and with the records copied or committed a study goes on on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck import protocol
from limbeck.arms import Arm, named_teachers
from limbeck.cache import model_content
from limbeck.errors import RunError
from limbeck.evaluate import Benchmark
from limbeck.flops import asks_teacher
from limbeck.inputs import inputs_of
from limbeck.recipe import Recipe, parse_recipe
from limbeck.report import records
from limbeck.report.collect import TEACHER, UNTRAINED
from limbeck.report.records import RunRecord, read_record
from limbeck.run import Run, what_is_learned
from limbeck.study import Study, digest
from limbeck.teachers import ModelTeacher, Teacher


@dataclass(frozen=True)
class Task:
    """One run: an arm with a seed, at the rate that is tried or, after tuning, was chosen."""

    arm: str
    seed: int
    rate: float | None = None
    is_tuning: bool = False

    @property
    def folder(self) -> Path:
        return Path("tuning", self.arm, f"rate-{self.rate:g}") if self.is_tuning else Path("arms", self.arm, f"seed-{self.seed}")

    @property
    def name(self) -> str:
        return f"{self.arm}, learning rate {self.rate:g}" if self.is_tuning else f"{self.arm}, seed {self.seed}"


class Ledger:
    """A study's runs, in its directories: `path` for weights and the capture, `results` for records and reports."""

    def __init__(self, study: Study, path: Path | str, results: Path | str | None = None) -> None:
        self.study, self.path = study, Path(path)
        self.results = Path(results) if results is not None else self.path
        self.arms: dict[str, Arm] = study.plan()
        self.teacher_of = named_teachers(self.arms, study.baseline)
        """By arm, the name of its teacher."""
        self._identities: dict[str, dict[str, Any]] = {}
        self._tried: dict[str, dict[float, dict[str, Any]]] = {}

    @property
    def base(self) -> Recipe:
        """The baseline's recipe: what all arms share stands in it."""
        return self.arms[self.study.baseline].recipe

    # what a run is

    def tuning_tasks(self) -> list[Task]:
        """Runs that choose rates, parents first. Controls take the baseline's rate."""
        tune = self.study.tune
        if tune is None:
            return []
        grids = {arm: self._grid(arm) for arm, its in self.arms.items() if its.role == "arm"}
        return [Task(arm, tune.seed, rate, True) for arm, rates in grids.items() if len(rates) > 1 for rate in rates]

    def _grid(self, arm: str) -> list[float]:
        """The rates that are tried for an arm; the baseline's for the baseline at another cost."""
        tune = self.study.tune
        named = self.study.baseline if self.arms[arm].at_cost_of else arm
        return tune.of.get(named, tune.learning_rates) if tune else []

    def tunable(self) -> list[Task]:
        """Tuning runs without a record that can begin: all arms that they start from have their rates."""
        waiting = [task for task in self.tuning_tasks() if self.recorded(task) is None]
        arms = {task.arm for task in waiting}
        return [task for task in waiting if arms.isdisjoint(self.ancestors(task.arm))]

    def ancestors(self, arm: str) -> list[str]:
        """The arms that it starts from, nearest first."""
        parent = self.arms[arm].parent
        return [parent, *self.ancestors(parent)] if parent else []

    def tasks(self) -> list[Task]:
        """All runs, seed by seed, so that a study that is stopped has whole comparisons to show."""
        most = max(len(arm.seeds) for arm in self.arms.values())
        return [
            Task(arm.name, arm.seeds[n], self.rate_of(arm.name)) for n in range(most) for arm in self.arms.values() if n < len(arm.seeds)
        ]

    def rate_of(self, arm: str) -> float | None:
        """The rate that tuning chose, or the only one of its grid; None where there is none to choose. A handicap that is a rate stays."""
        if self.arms[arm].role == "planted" and _plants_rate(self.study):
            return None
        tuned = arm if self.arms[arm].role == "arm" else self.study.baseline
        if len(grid := self._grid(tuned)) == 1:
            return grid[0]
        found = self.tried(tuned)
        if not found:
            return None
        best = max if all(its["higher_is_better"] for its in self._validated(tuned).values()) else min
        return best(sorted(found), key=lambda rate: found[rate])  # of equals the lowest

    def tried(self, arm: str) -> dict[float, float]:
        """The validation score of every rate of an arm; empty until all of them are there."""
        return {rate: its["value"] for rate, its in self._validated(arm).items() if its["value"] is not None}

    def _validated(self, arm: str) -> dict[float, dict[str, Any]]:
        """The validation metric at every rate of an arm; empty until all of them are there."""
        if arm in self._tried:
            return self._tried[arm]
        tasks = [task for task in self.tuning_tasks() if task.arm == arm]
        found = {task.rate: self.recorded(task) for task in tasks}
        if not tasks or None in found.values():
            return {}
        assert self.study.tune is not None
        benchmark, metric = self.study.tune.evaluate.key, self.study.tune.metric
        validated = {}
        for rate, record in found.items():
            metrics = record.evals[benchmark]["metrics"] if record else {}
            if metric and metric not in metrics:  # what the harness will measure is not known before
                raise RunError(f"tune.metric: found {metric!r}, expected one that {benchmark!r} measured: {', '.join(metrics)}")
            if rate and metrics:
                validated[rate] = metrics[metric or next(iter(metrics))]
        self._tried[arm] = validated
        return validated

    def parent(self, task: Task) -> Task | None:
        """The run whose student this one starts from: of the same seed, or in tuning the parent's best."""
        parent = self.arms[task.arm].parent
        if parent is None:
            return None
        return Task(parent, task.seed, self.rate_of(parent), task.is_tuning)

    def key(self, task: Task) -> str:
        """The hash of all that decides the run's result, and of nothing else: no paths, settings of speed, processes or benchmarks."""
        recipe = self._at(task)
        tree = what_is_learned(recipe.to_json())
        tree |= inputs_of(recipe)
        chosen_by = recipe.chosen_by
        if chosen_by is not None:
            tree["chosen_by"] = self._identity(chosen_by)
        else:  # evaluations that choose nothing change nothing
            tree["train"].pop("evaluate_every", None)
        del tree["evaluate"], tree["capture"]
        if not asks_teacher(recipe) and not (chosen_by is not None and chosen_by.needs_teacher):
            del tree["teacher"]
        elif self.study.capture:
            tree["capture"] = self._captured
        if parent := self.parent(task):  # all but adapters is the parent's
            begun, lora = self.key(parent), tree["student"].get("lora")
            tree["student"] = {"parent": begun, "lora": lora} if lora else begun
        return digest(tree)

    def _at(self, task: Task) -> Recipe:
        """The recipe at a seed and rate, with the live teacher and the parent's untrained student."""
        changes = [f"seed={task.seed}", *([f"train.optimizer.learning_rate={task.rate!r}"] if task.rate else [])]
        return parse_recipe(self.arms[task.arm].recipe, changes, where=f"arm {task.arm!r}")

    def recipe(self, task: Task) -> Recipe:
        """What is trained: the captured teacher, the parent's student, and no benchmark but those that are asked during training, as
        grading is apart."""
        recipe = self._at(task)
        during = {benchmark.key for benchmark in recipe.during}
        tree = recipe.to_json()
        tree["evaluate"] = [its for its, benchmark in zip(tree["evaluate"], recipe.evaluate, strict=True) if benchmark.key in during]
        if self.study.capture:
            tree["teacher"] = self.given(self.teacher_of[task.arm])
        if parent := self.parent(task):
            tree["student"] = {"model": str(Run(self.path / parent.folder).student)} | (
                {"lora": tree["student"]["lora"]} if tree["student"].get("lora") else {}
            )
        return parse_recipe(tree, where=f"arm {task.arm!r}")

    @property
    def teachers(self) -> dict[str, Teacher]:
        """By name; the study's is the first."""
        found = {TEACHER: self.base.teacher}
        return found | {name: self.arms[arm].recipe.teacher for arm, name in self.teacher_of.items() if name != TEACHER}

    def given(self, name: str) -> dict[str, Any]:
        """The teacher of that name as arms are given it."""
        if self.study.capture:
            return {"type": "store", "path": str(self.path / name)}
        return dict(self.teachers[name].model_dump(mode="json"))

    @property
    def _captured(self) -> dict[str, Any] | None:
        return self.study.capture.model_dump(mode="json", include={"codec", "hidden", "calibrate_on"}) if self.study.capture else None

    def teacher_key(self, name: str = TEACHER) -> str:
        """The hash of a teacher, as it was captured. Benchmarks compare with the study's."""
        return digest([_told(self.teachers[name]), self._captured])

    # what is there

    def file(self, task: Task) -> Path:
        kind = "tuning-" if task.is_tuning else ""
        what = f"rate-{task.rate:g}" if task.is_tuning else f"seed-{task.seed}"
        return self.results / records.FOLDER / f"{kind}{task.arm}-{what}-{self.key(task)[:12]}.json"

    def recorded(self, task: Task) -> RunRecord | None:
        """The record of a run with every benchmark that is asked for, or None."""
        file = self.file(task)
        record = read_record(file) if file.is_file() else None
        return record if record and not self.missing(record, self.benchmarks(task)) else None

    def benchmarks(self, task: Task) -> list[Benchmark]:
        return [self.study.tune.evaluate] if task.is_tuning and self.study.tune else list(self.base.evaluate)

    def missing(self, record: RunRecord, benchmarks: Sequence[Benchmark]) -> list[Benchmark]:
        """Benchmarks that the record lacks, or has of other cases, settings or another teacher."""
        return [
            benchmark
            for benchmark in benchmarks
            if any(record.evals.get(benchmark.key, {}).get(name) != value for name, value in self._identity(benchmark).items())
            or (benchmark.needs_teacher and record.teacher != self.teacher_key())
        ]

    def _identity(self, benchmark: Benchmark) -> dict[str, Any]:
        settings = benchmark.model_dump_json()  # what tunes may have the name of what tests
        if settings not in self._identities:
            self._identities[settings] = {
                "version": benchmark.version,
                "settings": json.loads(settings),
                "cases": benchmark.fingerprint(),
            }
        return self._identities[settings]

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        tasks = self.tuning_tasks()
        if not self.missing_references() and all(self.recorded(task) for task in tasks):
            return all(self.recorded(task) for task in self.tasks())
        return False

    @property
    def references(self) -> list[str]:
        """What is measured beside the arms. A teacher can be where it is a live model."""
        return [*(name for name, teacher in self.teachers.items() if isinstance(teacher, ModelTeacher)), UNTRAINED]

    def reference_file(self, name: str) -> Path:
        student = self.base.to_json()["student"]
        what = _known(student, model_content(student["model"])) if name == UNTRAINED else _told(self.teachers[name])
        return self.results / records.FOLDER / f"reference-{name}-{digest(what)[:12]}.json"

    @property
    def prompts(self) -> str:
        """The hash of the student, whose tokenizer and template make the prompts of all."""
        student = self.base.to_json()["student"]
        return digest([student["model"], student["revision"], model_content(student["model"])])

    def missing_references(self) -> list[str]:
        """References of which a result is still to be made. Older records do not say whose prompts they had."""
        if not self.study.references or not self.base.evaluate:
            return []
        found = {name: read_record(file) for name in self.references if (file := self.reference_file(name)).is_file()}
        return [
            name
            for name in self.references
            if (record := found.get(name)) is None
            or record.about.get("prompts", self.prompts) != self.prompts
            or self.missing(record, self.base.evaluate)
        ]

    def index(self) -> None:
        """Tell the report which records are of this study, and what tuning chose."""
        tasks = self.tasks()
        protocol.index(
            self.results,
            {
                "arms": {
                    arm: {str(task.seed): self.file(task).name for task in tasks if task.arm == arm and self.file(task).is_file()}
                    for arm in self.arms
                },
                "references": {name: file.name for name in self.references if (file := self.reference_file(name)).is_file()},
                "tuning": {
                    arm: {"tried": {f"{rate:g}": value for rate, value in self.tried(arm).items()}, "chosen": self.rate_of(arm)}
                    for arm in dict.fromkeys(task.arm for task in self.tuning_tasks())
                },
            },
        )


def _told(teacher: Teacher) -> Any:
    return _known(teacher.model_dump(mode="json"), teacher.content())


def _known(tree: dict[str, Any], content: str | None) -> Any:
    """A model as a recipe has it, and what lies in its folder where it is one."""
    return tree if content is None else [tree, content]


def _plants_rate(study: Study) -> bool:
    """Whether the known handicap is a learning rate."""
    tree: Any = study.primary.planted if study.primary else {}
    for key in ("train", "optimizer", "learning_rate"):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree is not None
