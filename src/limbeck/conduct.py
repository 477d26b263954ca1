"""Conduct: carries a study out. Capture, references, learning rates, runs; each leaves a record, and what is recorded is not done again.

DIR/teacher/             the captured teacher, if one is wanted     DIR/arms/ARM/seed-N/          a run each, with its weights
DIR/tuning/ARM/rate-R/   runs that choose a learning rate           DIR/replaced/                 runs of an arm that was changed since
RESULTS/study.json       what the study is, its protocol, an index  RESULTS/records/              a small file per run: see report/records
RESULTS/capture.json     what the capture took                      RESULTS/report.{html,md,json}

RESULTS is DIR unless another folder is named; it is small, meant to be committed, and enough to go on elsewhere. A run is known by the hash
of all that decides its result, so a changed arm runs again and no other does, and a benchmark that is added is measured alone.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck import protocol
from limbeck.cache import weight_shapes
from limbeck.errors import ModelError, RecipeError
from limbeck.evaluate import Benchmark
from limbeck.ledger import Ledger, Task, asks_teacher
from limbeck.log import is_main_process, say
from limbeck.objectives.base import Needs, needs_of
from limbeck.recipe import Recipe, check_files, parse_recipe
from limbeck.report import records
from limbeck.report.collect import REFERENCES
from limbeck.report.records import RunRecord, read_record, write_record
from limbeck.run import Run, differences, what_is_run
from limbeck.study import Study, digest
from limbeck.teachers import ModelTeacher

if TYPE_CHECKING:
    from limbeck.distributed import World


KEY = "key.json"
"""In a run's directory: the hash that it is known by."""


class Conduct:
    """A study at work. Every method may be called again and does what is left."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.path = ledger, ledger.path
        self.seconds: dict[str, float] = {}

    def run(self, world: World) -> None:
        """Do what is left of the study."""
        from limbeck import distributed

        waiting = [task for task in self.ledger.tuning_tasks() if self.ledger.recorded(task) is None]
        if self.ledger.study.capture and (waiting or not self.ledger.is_finished):
            self._capture(world)
        distributed.barrier(world)
        if world.is_main:
            for name in self.ledger.missing_references():
                with self._phase(REFERENCES[name]):
                    self._refer(name, world)
        distributed.barrier(world)
        for task in waiting:
            self.do(task, world)
        if world.is_main:
            self.ledger.index()
        for task in self.ledger.tasks():
            self.do(task, world)
            if world.is_main:
                self.ledger.index()

    def do(self, task: Task, world: World) -> None:
        """Train and grade what a task lacks, and write its record."""
        from limbeck import distributed

        if self.ledger.recorded(task) is not None:
            return
        run = Run(self.path / task.folder)
        with self._phase(task.name):
            self._train(task, run, world)
            if world.is_main:
                self._grade_run(task, run, world)
            distributed.barrier(world)

    def _train(self, task: Task, run: Run, world: World) -> None:
        """The run's weights, made or there already; first those that it starts from, whose record may have come from elsewhere."""
        from limbeck import distributed
        from limbeck.trainer import train

        key = self.ledger.key(task)
        if run.is_finished and run.read_json(KEY, {}).get("key") == key:
            return
        if parent := self.ledger.parent(task):
            self._train(parent, Run(self.path / parent.folder), world)
        recipe = self.ledger.recipe(task)
        if world.is_main:
            self._make_room(run, recipe)
        distributed.barrier(world)
        train(recipe, run.path)
        if world.is_main:
            run.write_json(KEY, {"key": key})

    def _make_room(self, run: Run, recipe: Recipe) -> None:
        """Set a run aside that was made of another recipe."""
        there = run.read_json("recipe.json", {})
        if there and differences(what_is_run(there), what_is_run(recipe.to_json())):
            aside = self.path / "replaced" / f"{run.path.parent.name}-{run.path.name}-{digest(there)[:8]}"
            say(f"{run.path}: the arm was changed since; this run is kept in {aside}")
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            run.path.rename(aside)

    def _grade_run(self, task: Task, run: Run, world: World) -> None:
        from limbeck.models import load_model, load_tokenizer

        record = replace(records.of_run(run.path, task.arm, task.seed), key=self.ledger.key(task), teacher=self.ledger.teacher_key)
        benchmarks = self.ledger.benchmarks(task)
        if benchmarks:
            model = load_model(str(run.student), "float32", None, world.device)
            self._grade(model, load_tokenizer(str(run.student), None), benchmarks, run.path, world)
            wanted = [benchmark.key for benchmark in benchmarks]
            record = replace(record, evals={name: result for name, result in run.evals().items() if name in wanted})
        about: dict[str, Any] = {"compute": compute(self.ledger.arms[task.arm].recipe, record)}
        if parent := self.ledger.parent(task):
            file, folder = self.ledger.file(parent), self.path / parent.folder
            above = read_record(file) if file.is_file() else records.of_run(folder, parent.arm, parent.seed)
            about["parent"] = {"arm": parent.arm, "tokens": above.totals["tokens"], **above.about}
        write_record(self.ledger.file(task), replace(record, about=about))

    def _grade(self, model: Any, tokenizer: Any, benchmarks: Sequence[Benchmark], out: Path, world: World) -> None:
        from limbeck.evaluate import Subject
        from limbeck.evaluate.runner import evaluate

        teacher = parse_recipe(
            self.ledger.base.to_json() | {"evaluate": [], "objective": [], "teacher": self.ledger.teacher}, where="teacher"
        ).teacher
        for result in evaluate(benchmarks, Subject(model.eval(), tokenizer, world.device, teacher), out / "evals"):
            Run(out).write_json(f"evals/{result.name}.json", result.to_json())

    def _refer(self, name: str, world: World) -> None:
        """Grade the teacher itself, or the student as it is before the first step, with the arms' benchmarks."""
        from limbeck.models import load_model, load_tokenizer
        from limbeck.student import build

        student, _ = self.ledger.base.for_training()
        teacher = self.ledger.base.teacher
        if name == "teacher":
            assert isinstance(teacher, ModelTeacher)
            model = load_model(teacher.model, teacher.dtype, teacher.revision, world.device, teacher.load_in)
        else:
            model = build(student.model_copy(update={"lora": None}), world.device)
        # prompts are the same for all: those of the student's tokenizer and template
        out = self.path / "references" / name
        self._grade(model, load_tokenizer(student.model, student.revision), self.ledger.base.evaluate, out, world)
        wanted = [benchmark.key for benchmark in self.ledger.base.evaluate]
        evals = {key: result for key, result in Run(out).evals().items() if key in wanted}
        write_record(self.ledger.reference_file(name), RunRecord(name, 0, {}, {}, {}, {}, [], evals, teacher=self.ledger.teacher_key))

    def _capture(self, world: World) -> None:
        """Walk every source that an arm with a teacher trains on, and keep all blocks that any arm maps. capture.json says what it took."""
        from limbeck.capture import capture

        spec, here = self.ledger.study.capture, Run(self.ledger.results)
        assert spec is not None
        asking = [arm.recipe for arm in self.ledger.arms.values() if asks_teacher(arm.recipe)] or [self.ledger.base]
        layers = sorted({layer for recipe in asking for layer in _needs(recipe).layers})
        about = {"teacher": self.ledger.teacher_key, "layers": layers}
        folder, took = self.path / "teacher", here.read_json("capture.json", {"seconds": 0.0})
        if took.get("about", about) != about:
            if world.is_main and folder.is_dir():
                aside = self.path / "replaced" / f"teacher-{digest(took['about'])[:8]}"
                say(f"{folder}: more or other is asked of the teacher than it holds; this capture is kept in {aside}")
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(aside)
            took = {"seconds": 0.0}
        sources = {recipe.source.model_dump_json(): recipe for recipe in asking}
        section = {"path": str(folder), "layers": layers, **spec.model_dump(mode="json")}
        if took.get("complete") == digest([list(sources), about]) and folder.is_dir():
            return
        start = time.perf_counter()
        with self._phase("capture"):
            try:
                for recipe in sources.values():
                    tree = recipe.to_json() | {"objective": [], "capture": section, "evaluate": self.ledger.base.to_json()["evaluate"]}
                    manifest = capture(parse_recipe(tree, where="capture"))
                took |= {"num_samples": manifest.num_samples, "num_scored": manifest.num_scored, "num_bytes": manifest.num_bytes}
                took |= {"layers": list(manifest.layers), "complete": digest([list(sources), about])}
            finally:
                # a capture that was stopped goes on where it was, and so does its clock
                if world.is_main:
                    here.write_json("capture.json", took | {"about": about, "seconds": took["seconds"] + time.perf_counter() - start})

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Time a phase, and give its memory back, so that the next one's peak is its own."""
        say(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        gc.collect()
        with suppress(OSError, AttributeError):  # where the C library is another
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def run_study(study: Study, path: Path | str, results: Path | str | None = None) -> dict[str, Any]:
    """Capture, measure the references, train and measure every arm with every seed, and write the report; returns its figures.

    `path` holds the weights and the capture, `results` the records and the report (`path` where it is not given).
    """
    ledger = Ledger(study, path, results)
    conduct = Conduct(ledger)
    for number, (arm, its) in enumerate(ledger.arms.items()):
        # the benchmarks are the same for all, and checking one may mean making its cases
        if problems := check_files(its.recipe if number == 0 else its.recipe.model_copy(update={"evaluate": []})):
            raise RecipeError(f"arm {arm!r}: {'; '.join(dict.fromkeys(problems))}")
    if study.tune:
        study.tune.evaluate.check()
    if is_main_process():
        protocol.claim(study, ledger.path, ledger.results)
    if not ledger.is_finished:
        from limbeck import distributed

        with distributed.world() as world:
            conduct.run(world)
    if not is_main_process():
        return {}
    ledger.index()
    return _report(conduct)


def compute(recipe: Recipe, record: RunRecord) -> dict[str, float | None]:
    """Floating-point operations of a run, of the student and of the teacher as if it had scored every token anew."""
    tokens = record.totals["tokens"]
    return {f"{who}_flops": None if each is None else each * tokens for who, each in flops_per_token(recipe).items()}


def flops_per_token(recipe: Recipe) -> dict[str, float | None]:
    """The usual count: 6 for a trained parameter (2 forward, 4 backward), 4 for a frozen one of the student, 2 for one of the teacher"""
    student, _ = recipe.for_training()
    sizes, taught = student.num_parameters(), None
    if not asks_teacher(recipe):
        taught = 0
    elif isinstance(recipe.teacher, ModelTeacher) and (shapes := weight_shapes(recipe.teacher.model, recipe.teacher.revision)):
        taught = sum(prod(shape) for shape in shapes.values())
    return {
        "student": 6.0 * sizes["trained"] + 4.0 * sizes["frozen"] if sizes else None,
        "teacher": None if taught is None else 2.0 * taught,
    }


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
    from limbeck.report.tables import print_table, quality

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
        **{key: figures[key] for key in ("name", "seeds", "num_runs", "statement", "answer", "scores", "differences", "costs", "budgets")},
    }
