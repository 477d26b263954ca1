"""Study: arms x seeds. One base recipe, each arm a few changes laid over it, all of them on one teacher and the same benchmarks.

DIR/study.json   what the study is, every arm's recipe resolved     DIR/references/{teacher,untrained}/evals/   what to compare with
DIR/teacher/     the captured teacher, if one is wanted             DIR/arms/ARM/seed-N/                        a run each
Started again, finished runs are kept and others go on; another study in the same directory is refused.
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from limbeck.errors import ModelError, RecipeError, RunError
from limbeck.log import is_main_process, say
from limbeck.objectives.base import Needs, needs_of
from limbeck.recipe import Recipe, check_files, parse_recipe
from limbeck.report.collect import REFERENCES
from limbeck.run import Run, differences, write_json
from limbeck.spec import Spec, load_yaml, member_of, merge, override, validate
from limbeck.store import Codec, Exact, HiddenCodec
from limbeck.teachers import ModelTeacher

if TYPE_CHECKING:
    from limbeck.distributed import World

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OF_THE_STUDY = {
    "seed": "seeds are the study's: set `seeds`",
    "teacher": "all arms of a study have one teacher: set base.teacher, or make two studies",
    "evaluate": "all arms are measured alike: set base.evaluate",
    "capture": "the teacher is captured once for all arms: set the study's `capture`",
}


class TeacherCapture(Spec):
    """How the teacher is captured for all arms. Which blocks are stored follows from what the arms map."""

    codec: member_of(Codec) = Exact()  # type: ignore[valid-type]
    """How the teacher's output is kept."""
    hidden: member_of(HiddenCodec) | None = None  # type: ignore[valid-type]
    """How hidden states are kept; in the teacher's dtype where it is not set."""
    batch_size: int = Field(8, gt=0)
    """Conversations per forward of the teacher."""
    samples_per_shard: int = Field(256, gt=0)
    """Conversations per file: what a kill can cost."""
    calibrate_on: int = Field(64, gt=0)
    """Conversations of the source on which codecs are fitted, at most half of them. What is lost is measured on others."""


class Study(Spec):
    """Arms x seeds."""

    name: str
    """Names the directory of results: letters, digits, dot, dash, underscore."""
    question: str = ""
    """What the study is to find out: the headline of its report."""
    base: str | dict[str, Any]
    """The recipe that all arms share, or the path of its YAML file, seen from the study's file. Its `seed` and `capture` are not used."""
    arms: dict[str, dict[str, Any]]
    """By name, what an arm changes in the base: mappings are merged, lists and values replaced."""
    seeds: list[int] = [0]
    """Every arm is trained with each of these. More of them can be added to a study that has finished."""
    capture: TeacherCapture | None = None
    """Where it is set (`{}` will do), the teacher scores the data once for all arms; else each arm runs it anew."""
    references: bool = True
    """Also measure the teacher itself and the student before training."""

    @field_validator("name")
    @classmethod
    def _safe(cls, name: str) -> str:
        if not _SAFE_NAME.fullmatch(name):
            raise ValueError(f"found {name!r}, expected a file name of letters, digits, dot, dash and underscore")
        return name

    @field_validator("arms")
    @classmethod
    def _arms(cls, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not arms:
            raise ValueError("found no arm, expected at least one, such as {sft: {objective: [{type: ce}]}}")
        for arm, changes in arms.items():
            if not _SAFE_NAME.fullmatch(arm) or arm in REFERENCES.values():
                taken = " and ".join(REFERENCES.values())
                raise ValueError(
                    f"found arm {arm!r}, expected a file name of letters, digits, dot, dash and underscore, other than {taken}"
                )
            for key in changes:
                if key in _OF_THE_STUDY:
                    raise ValueError(f"arm {arm!r} sets {key!r}; {_OF_THE_STUDY[key]}")
        if len({arm.lower() for arm in arms}) < len(arms):
            raise ValueError(f"found arms {', '.join(arms)}, expected names that differ by more than case")
        return arms

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: list[int]) -> list[int]:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"found {seeds}, expected at least one number from 0, none twice")
        return seeds

    def recipes(self, where: str = "study") -> dict[str, Recipe]:
        """Every arm's recipe, resolved and validated; an error names the arm. The seed is that of the first."""
        base = load_yaml(self.base) if isinstance(self.base, str) else self.base
        shared = {key: value for key, value in base.items() if key not in ("seed", "capture")}
        recipes = {}
        for arm, changes in self.arms.items():
            tree = merge(shared, changes) | {"seed": self.seeds[0]}
            recipes[arm] = parse_recipe(tree, where=f"{where}: arm {arm!r}")
            try:
                recipes[arm].for_training()
            except RecipeError as error:
                raise RecipeError(f"{where}: arm {arm!r}: {error}") from None
            if self.capture and not isinstance(recipes[arm].teacher, ModelTeacher):
                found = recipes[arm].teacher.type
                raise RecipeError(
                    f"{where}: capture is set, and base.teacher is {found!r}; expected {{type: model, model: NAME}}, or no capture"
                )
        return recipes


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """The study in a YAML file, its base read and every arm validated; torch-free."""
    path = Path(path)
    tree = load_yaml(path)
    if isinstance(tree.get("base"), str):
        tree["base"] = load_yaml(path.parent / tree["base"])
    study = validate(Study, override(tree, overrides), str(path))
    study.recipes(str(path))
    return study


def run_study(study: Study, path: Path | str) -> dict[str, Any]:
    """Capture, measure the references, train and measure every arm with every seed, and write the report; returns its figures."""
    path = Path(path)
    recipes = study.recipes()
    for number, (arm, recipe) in enumerate(recipes.items()):
        # the benchmarks are the same for all, and checking one may mean making its cases
        if problems := check_files(recipe if number == 0 else recipe.model_copy(update={"evaluate": []})):
            raise RecipeError(f"arm {arm!r}: {'; '.join(dict.fromkeys(problems))}")
    if is_main_process():
        _claim(study, recipes, path)
    seconds: dict[str, float] = {}
    if any(not run.is_finished for _, _, run in _runs(study, path)) or _missing_references(study, recipes, path):
        from limbeck import distributed

        with distributed.world() as world:
            _run(study, recipes, path, seconds, world)
    return _report(path, seconds) if is_main_process() else {}


def _run(study: Study, recipes: dict[str, Recipe], path: Path, seconds: dict[str, float], world: World) -> None:
    from limbeck import distributed
    from limbeck.trainer import train

    if study.capture and not _is_captured(path):
        with _phase("capture", seconds):
            _capture(study.capture, recipes, path, world)
    distributed.barrier(world)
    if world.is_main:
        for name in _missing_references(study, recipes, path):
            with _phase(REFERENCES[name], seconds):
                first = next(iter(recipes.values()))
                live = first.teacher if name == "teacher" and isinstance(first.teacher, ModelTeacher) else None
                _measure(name, live, _with_store(study, first, path), path / "references" / name, world.device)
    distributed.barrier(world)
    for arm, seed, run in _runs(study, path):
        if run.is_finished:
            continue
        with _phase(arm + (f", seed {seed}" if len(study.seeds) > 1 else ""), seconds):
            tree = _with_store(study, recipes[arm], path).to_json() | {"seed": seed}
            train(parse_recipe(tree, where=f"arm {arm!r}"), run.path)


def _runs(study: Study, path: Path) -> Iterator[tuple[str, int, Run]]:
    """Seed by seed, so that a study that is stopped has whole comparisons to show."""
    for seed in study.seeds:
        for arm in study.arms:
            yield arm, seed, Run(path / "arms" / arm / f"seed-{seed}")


def _with_store(study: Study, recipe: Recipe, path: Path) -> Recipe:
    """The recipe with the captured teacher in place of the live one."""
    if not study.capture:
        return recipe
    return parse_recipe(recipe.to_json() | {"teacher": {"type": "store", "path": str(path / "teacher")}}, where="captured teacher")


def _is_captured(path: Path) -> bool:
    return bool(Run(path).read_json("capture.json", {}).get("complete")) and (path / "teacher").is_dir()


def _capture(spec: TeacherCapture, recipes: dict[str, Recipe], path: Path, world: World) -> None:
    """Walk every source that an arm with a teacher trains on, and keep all blocks that any arm maps. capture.json says what it took."""
    from limbeck.capture import capture

    here = Run(path)
    took = here.read_json("capture.json", {"seconds": 0.0})
    needs = {arm: _needs(recipe) for arm, recipe in recipes.items()}
    layers = sorted({layer for its in needs.values() for layer in its.layers})
    section = {"path": str(path / "teacher"), "layers": layers, **spec.model_dump(mode="json")}
    asking = [recipes[arm] for arm, its in needs.items() if its.anything] or list(recipes.values())[:1]
    sources = {recipe.source.model_dump_json(): recipe for recipe in asking}
    start = time.perf_counter()
    try:
        for recipe in sources.values():
            manifest = capture(parse_recipe(recipe.to_json() | {"objective": [], "capture": section}, where="capture"))
        took = took | {"num_samples": manifest.num_samples, "num_scored": manifest.num_scored, "num_bytes": manifest.num_bytes}
        took = took | {"layers": list(manifest.layers), "complete": True}
    finally:
        # a capture that was stopped goes on where it was, and so does its clock
        if world.is_main:
            here.write_json("capture.json", took | {"seconds": took["seconds"] + time.perf_counter() - start})


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


def _missing_references(study: Study, recipes: dict[str, Recipe], path: Path) -> list[str]:
    """References of which a result is still to be made. A teacher can be measured where it is a live model."""
    first = next(iter(recipes.values()))
    wanted = [benchmark.key for benchmark in first.evaluate] if study.references else []
    names = ["teacher", "untrained"] if isinstance(first.teacher, ModelTeacher) else ["untrained"]
    return [name for name in names if set(wanted) - set(Run(path / "references" / name).evals())]


def _measure(name: str, teacher: ModelTeacher | None, recipe: Recipe, out: Path, device: str) -> None:
    """Grade the teacher itself, or the student as it is before the first step, with the arms' benchmarks."""
    from limbeck.evaluate import Subject
    from limbeck.evaluate.runner import evaluate
    from limbeck.models import load_model, load_tokenizer
    from limbeck.student import build

    student, _ = recipe.for_training()
    if teacher is not None:
        model = load_model(teacher.model, teacher.dtype, teacher.revision, device, teacher.load_in)
    else:
        model = build(student.model_copy(update={"lora": None}), device)
    # prompts are the same for all: those of the student's tokenizer and template
    subject = Subject(model.eval(), load_tokenizer(student.model, student.revision), device, recipe.teacher)
    for result in evaluate(recipe.evaluate, subject, out / "evals"):
        Run(out).write_json(f"evals/{result.name}.json", result.to_json())


def _claim(study: Study, recipes: dict[str, Recipe], path: Path) -> None:
    """Take the directory for this study. What would change a run must be as it was; name, question, seeds and references may differ."""
    resolved = {arm: {key: value for key, value in recipe.to_json().items() if key != "seed"} for arm, recipe in recipes.items()}
    captured = study.capture.model_dump(mode="json", include={"codec", "hidden", "calibrate_on"}) if study.capture else None
    file = path / "study.json"
    if file.is_file():
        there = Run(path).read_json("study.json")
        differing = _changes(there.get("recipes", {}), resolved)
        differing += [line for _, line in differences(there.get("captured"), captured, "capture")]
        if differing:
            shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
            raise RunError(f"{path}: holds another study ({shown}); choose another directory, or delete this one")
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path}: exists and is no study's directory; choose another path")
    about = {"name": study.name, "question": study.question, "seeds": study.seeds, "references": study.references}
    write_json(file, {"format": "limbeck-study", "version": 1, **about, "captured": captured, "recipes": resolved})


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the recipes of two studies; what differs alike in every arm is said once."""
    by_arm = {arm: differences(old.get(arm), new.get(arm)) for arm in dict.fromkeys((*old, *new))}
    shared = [entry for entry in next(iter(by_arm.values()), []) if all(entry in entries for entries in by_arm.values())]
    own = [f"{arm}{'.' if key else ' '}{line}" for arm, entries in by_arm.items() for key, line in entries if (key, line) not in shared]
    return [f"in every arm {line}" for _, line in shared] + own


@contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Time a phase, and give its memory back, so that the next one's peak is its own."""
    say(name)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    gc.collect()
    with suppress(OSError, AttributeError):  # where the C library is another
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _report(path: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Write the report, show it, and return what programs want of it."""
    from limbeck.report.collect import collect
    from limbeck.report.page import build_report
    from limbeck.report.tables import print_table, quality

    start = time.perf_counter()
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
