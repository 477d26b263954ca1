"""Conduct: carries a study out. Capture, references, learning rates, runs; each leaves a record, and what is recorded is not done again.

DIR/teacher/             the captured teacher, if one is wanted     DIR/arms/ARM/seed-N/          a run each, with its weights
DIR/tuning/ARM/rate-R/   runs that choose a learning rate           DIR/replaced/                 runs of an arm that was changed since
RESULTS/study.json       what the study is, its protocol, an index  RESULTS/records/              a small file per run: see report/records
RESULTS/capture.json     what the capture took                      RESULTS/report.{html,md,json}

RESULTS is DIR unless another folder is named; it is small, meant to be committed, and enough to go on elsewhere. A run is known by the hash
of all that decides its result, so a changed arm runs again and no other does, and a benchmark that is added is measured alone.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck import heap, protocol
from limbeck.bookkeeping import changed_inputs
from limbeck.errors import ModelError, RecipeError, RunError
from limbeck.evaluate import Benchmark
from limbeck.flops import asks_teacher, compute
from limbeck.inputs import inputs_of
from limbeck.jobs import Executor, Job, Local
from limbeck.ledger import Ledger, Task
from limbeck.log import is_main_process, say
from limbeck.objectives.base import Needs, needs_of
from limbeck.recipe import Recipe, check_files, parse_recipe
from limbeck.report import records
from limbeck.report.collect import TEACHER, UNTRAINED, capture_file
from limbeck.report.records import RunRecord, read_record, write_record
from limbeck.run import Run, differences, what_is_learned
from limbeck.study import Study, digest
from limbeck.teachers import ModelTeacher

if TYPE_CHECKING:
    from limbeck.distributed import World


SHOWN = ("name", "seeds", "num_runs", "statement", "answer", "scores", "differences", "costs", "equal_compute", "budgets")
"""Of the report's figures, what `run_study` returns."""
KEY = "key.json"
"""In a run's directory: the hash that it is known by."""


class Conduct:
    """A study at work. Every method may be called again and does what is left; each is a job for any process that sees the directories."""

    def __init__(self, ledger: Ledger, executor: Executor | None = None) -> None:
        self.ledger, self.path = ledger, ledger.path
        self.executor: Executor = executor or Local()
        self.seconds: dict[str, float] = {}

    def run(self, world: World) -> None:
        """Do what is left of the study."""
        ledger = self.ledger
        if ledger.study.capture and not ledger.is_finished:
            for name in ledger.teachers:
                self._capture(name, world)
        jobs = [Job(name, partial(self.refer, name)) for name in ledger.missing_references()]
        while tuning := ledger.tunable():
            self._do([*jobs, *self._jobs(tuning)], tuning, world)
            jobs = []
        tasks = ledger.tasks()
        self._do([*jobs, *self._jobs(tasks)], tasks, world)

    def _jobs(self, tasks: Sequence[Task]) -> list[Job]:
        """The runs that have no record, each after the one that it starts from, which is made again where its weights are not here."""
        asked = {task: True for task in tasks if self.ledger.recorded(task) is None}
        line: dict[Task, bool] = {}
        for task in asked:
            ancestors = [task]
            while (parent := self.ledger.parent(ancestors[0])) and (parent in asked or not self._is_trained(parent)):
                ancestors.insert(0, parent)
            line |= {one: one in asked for one in ancestors if one not in line}
        parents = {task: self.ledger.parent(task) for task in line}
        return [
            Job(task.name, partial(self.do, task, is_asked), (parent.name,) if (parent := parents[task]) in line and parent else ())
            for task, is_asked in line.items()
        ]

    def _do(self, jobs: Sequence[Job], tasks: Sequence[Task], world: World) -> None:
        from limbeck import distributed

        distributed.barrier(world)  # all know what is to be done, before it changes
        for _, seconds in self.executor.run(jobs):
            self.seconds |= seconds
            if world.is_main:
                self.ledger.index()
        if lacking := [task.name for task in tasks if self.ledger.recorded(task) is None]:
            raise RunError(f"{lacking[0]}: done, and left no record in {self.ledger.results}; expected a folder that all workers see")

    def refer(self, name: str) -> dict[str, float]:
        """Grade a reference; the seconds that it took."""
        from limbeck import distributed

        with distributed.world() as world:
            if world.is_main:
                with self._phase(name):
                    self._refer(name, world)
            distributed.barrier(world)
        return self.seconds

    def do(self, task: Task, is_asked: bool) -> dict[str, float]:
        """Train what a run lacks, and where it is asked for, grade it and write its record; the seconds that it took."""
        from limbeck import distributed

        run = Run(self.path / task.folder)
        with distributed.world() as world, self._phase(task.name):
            self._train(task, run, world)
            if is_asked and world.is_main:
                self._grade_run(task, run, world)
            distributed.barrier(world)
        return self.seconds

    def _is_trained(self, task: Task) -> bool:
        run = Run(self.path / task.folder)
        return run.is_finished and bool(run.read_json(KEY, {}).get("key") == self.ledger.key(task))

    def _train(self, task: Task, run: Run, world: World) -> None:
        """The run's weights, made or there already."""
        from limbeck import distributed
        from limbeck.trainer import train

        if self._is_trained(task):
            return
        recipe, key = self.ledger.recipe(task), self.ledger.key(task)
        if world.is_main:
            self._make_room(run, recipe, key)
        distributed.barrier(world)
        train(recipe, run.path)
        if world.is_main:
            run.write_json(KEY, {"key": key})
        if self.ledger.key(task) != key:
            raise RunError(f"{run.path}: what it is made from was changed while it was trained; start the study again to train it anew")

    def _make_room(self, run: Run, recipe: Recipe, key: str) -> None:
        """Set a run aside that was made of another recipe, or of other data, models or modules."""
        there = run.read_json("recipe.json", {})
        was = run.read_json(KEY, {}).get("key", key)
        if there and (was != key or differences(what_is_learned(there), what_is_learned(recipe.to_json())) or changed_inputs(run, recipe)):
            aside = self.path / "replaced" / f"{run.path.parent.name}-{run.path.name}-{digest([there, was])[:8]}"
            say(f"{run.path}: the arm, or what it is made from, was changed since; this run is kept in {aside}")
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            run.path.rename(aside)

    def _grade_run(self, task: Task, run: Run, world: World) -> None:
        from limbeck.models import load_model, load_tokenizer, weights_hash

        file, record = self.ledger.file(task), records.of_run(run.path, task.arm, task.seed)  # known by what they were before it is graded
        record = replace(record, key=self.ledger.key(task), teacher=self.ledger.teacher_key())
        benchmarks = self.ledger.benchmarks(task)
        if benchmarks:
            model = load_model(str(run.student), "float32", None, world.device)
            if weights_hash(dict(model.named_parameters())) != record.totals.get("weights_sha256"):
                raise RunError(f"{run.student}: the weights were altered since they were trained; delete {run.path} to train again")
            self._grade(model, load_tokenizer(str(run.student), None), benchmarks, run.path, world)
            wanted = [benchmark.key for benchmark in benchmarks]
            record = replace(record, evals={name: result for name, result in run.evals().items() if name in wanted})
        about: dict[str, Any] = {"compute": compute(self.ledger.arms[task.arm].recipe, record.totals["tokens"])}
        if parent := self.ledger.parent(task):
            its, folder = self.ledger.file(parent), self.path / parent.folder
            above = read_record(its) if its.is_file() else records.of_run(folder, parent.arm, parent.seed)
            about["parent"] = {"arm": parent.arm, "tokens": above.totals["tokens"], **above.about}
        write_record(file, replace(record, about=about))

    def _grade(self, model: Any, tokenizer: Any, benchmarks: Sequence[Benchmark], out: Path, world: World) -> None:
        from limbeck.evaluate import Subject
        from limbeck.evaluate.runner import evaluate

        teacher = parse_recipe(
            self.ledger.base.to_json() | {"evaluate": [], "objective": [], "train": None, "teacher": self.ledger.given(TEACHER)},
            where="teacher",
        ).teacher
        for result in evaluate(benchmarks, Subject(model.eval(), tokenizer, world.device, teacher), out / "evals"):
            Run(out).write_json(f"evals/{result.name}.json", result.to_json())

    def _refer(self, name: str, world: World) -> None:
        """Grade a teacher itself, or the student as it is before the first step, with the arms' benchmarks."""
        from limbeck.models import load_model, load_tokenizer
        from limbeck.student import build

        student, _ = self.ledger.base.for_training()
        if name == UNTRAINED:
            model = build(student.model_copy(update={"lora": None}), world.device)
        else:
            teacher = self.ledger.teachers[name]
            assert isinstance(teacher, ModelTeacher)
            model = load_model(teacher.model, teacher.dtype, teacher.revision, world.device, teacher.load_in)
        # prompts are the same for all: those of the student's tokenizer and template
        out = self.path / "references" / name
        self._grade(model, load_tokenizer(student.model, student.revision), self.ledger.base.evaluate, out, world)
        wanted = [benchmark.key for benchmark in self.ledger.base.evaluate]
        evals = {key: result for key, result in Run(out).evals().items() if key in wanted}
        record = RunRecord(name, 0, {}, {}, {}, {}, [], evals, teacher=self.ledger.teacher_key(), about={"prompts": self.ledger.prompts})
        write_record(self.ledger.reference_file(name), record)

    def _capture(self, name: str, world: World) -> None:
        """Walk every source that an arm with this teacher trains on, and keep all blocks that any of them maps. A file of results says what
        it took."""
        from limbeck.capture import capture

        spec, here = self.ledger.study.capture, Run(self.ledger.results)
        assert spec is not None
        those = [arm.recipe for arm in self.ledger.arms.values() if self.ledger.teacher_of[arm.name] == name]
        asking = [recipe for recipe in those if asks_teacher(recipe)] or ([self.ledger.base] if name == TEACHER else [])
        if not asking:
            return
        layers = sorted({layer for recipe in asking for layer in _needs(recipe).layers})
        about = {"teacher": self.ledger.teacher_key(name), "layers": layers}
        folder, file = self.path / name, capture_file(name)
        took = here.read_json(file, {"seconds": 0.0})
        if took.get("about", about) != about:
            if world.is_main and folder.is_dir():
                aside = self.path / "replaced" / f"{name}-{digest(took['about'])[:8]}"
                say(f"{folder}: the teacher is another, or more is asked of it than this holds; this capture is kept in {aside}")
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(aside)
            took = {"seconds": 0.0}
        sources = {recipe.source.model_dump_json(): recipe for recipe in asking}
        section = {"path": str(folder), "layers": layers, **spec.model_dump(mode="json")}
        told = [benchmark for benchmark in self.ledger.base.evaluate if benchmark.needs_teacher]
        whole = digest(
            [
                [[source, inputs_of(recipe)] for source, recipe in sources.items()],
                [[benchmark.model_dump_json(), benchmark.fingerprint()] for benchmark in told],
                about,
            ]
        )
        if took.get("complete") == whole and folder.is_dir():
            return
        start = time.perf_counter()
        with self._phase("capture" if name == TEACHER else f"capture of {name}"):
            try:
                for recipe in sources.values():
                    tree = recipe.to_json() | {"objective": [], "capture": section, "evaluate": self.ledger.base.to_json()["evaluate"]}
                    manifest = capture(parse_recipe(tree, where="capture"), executor=self.executor)
                took |= {"num_samples": manifest.num_samples, "num_scored": manifest.num_scored, "num_bytes": manifest.num_bytes}
                took |= {"layers": list(manifest.layers), "complete": whole}
            finally:
                # a capture that was stopped goes on where it was, and so does its clock
                if world.is_main:
                    here.write_json(file, took | {"about": about, "seconds": took["seconds"] + time.perf_counter() - start})

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Time a phase, and give its memory back, so that the next one's peak is its own."""
        say(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        gc.collect()
        heap.give_back()


def run_study(study: Study, path: Path | str, results: Path | str | None = None, executor: Executor | None = None) -> dict[str, Any]:
    """Capture, measure the references, train and measure every arm with every seed, and write the report; returns its figures.

    `path` holds the weights and the capture, `results` the records and the report (`path` where it is not given). `executor` does the
    runs; one by one in this process where it is not given.
    """
    ledger = Ledger(study, path, results)
    conduct = Conduct(ledger, executor)
    require_files_of_arms(ledger)
    if is_main_process():
        protocol.claim(study, ledger.path, ledger.results)
        ledger.index()  # of the study as it is now, should this one be stopped
    if not ledger.is_finished:
        from limbeck import distributed

        with distributed.world() as world:
            conduct.run(world)
    if not is_main_process():
        return {}
    ledger.index()
    return _report(conduct)


def require_files_of_arms(ledger: Ledger) -> None:
    """RecipeError, with the arm, where data or a benchmark's cases cannot be read."""
    for number, (arm, its) in enumerate(ledger.arms.items()):
        # the benchmarks are the same for all, and checking one may mean making its cases
        if problems := check_files(its.recipe if number == 0 else its.recipe.model_copy(update={"evaluate": []})):
            raise RecipeError(f"arm {arm!r}: {'; '.join(dict.fromkeys(problems))}")
    if ledger.study.tune:
        ledger.study.tune.evaluate.check()


def _needs(recipe: Recipe) -> Needs:
    """What an arm asks of the teacher. The configs of hub models that were never loaded are fetched for it."""
    student, _ = recipe.for_training()
    teacher = recipe.teacher
    assert isinstance(teacher, ModelTeacher)
    teacher.prepare()
    if student.shape() is None:
        from limbeck.models import fetch_config

        fetch_config(student.model, student.revision)
    shape, num_layers = student.shape(), teacher.provides().num_layers
    if shape is None or num_layers is None:
        raise ModelError(f"{student.model}, {teacher.model}: found no num_hidden_layers in config.json, expected decoders of transformers")
    return needs_of(recipe.terms, shape[0], num_layers)


def _report(conduct: Conduct) -> dict[str, Any]:
    """Write the report, show it, and return what programs want of it."""
    from limbeck.report.collect import collect
    from limbeck.report.page import build_report
    from limbeck.report.tables import quality
    from limbeck.report.terminal import print_table

    start, path, seconds = time.perf_counter(), conduct.ledger.results, conduct.seconds
    paths = build_report(path)
    seconds["report"] = time.perf_counter() - start
    figures = Run(path).read_json("report.json")
    print_table(quality(collect(path)), figures["name"])
    for text in (*figures["answer"], figures["statement"], figures["budgets"]["statement"]):
        say(text) if text else None
    say("took " + "; ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    for file in (paths.html, paths.markdown):
        say(f"report: {file}")
    return {
        "path": str(path),
        "report": {"html": str(paths.html), "markdown": str(paths.markdown), "json": str(paths.json)},
        "seconds": seconds,
        **{key: figures[key] for key in SHOWN},
    }
