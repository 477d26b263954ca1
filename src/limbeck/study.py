"""Study: what is compared. Arms x seeds over one base recipe, and, where a verdict is wanted, what decides it, declared beforehand.

A study with a `primary` metric checks itself: it adds the baseline once more with other seeds (A/A: any lead over it is chance) and once
with a known handicap (a lead that must be found). `conduct.py` carries a study out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from limbeck.arms import AGAIN, OTHER_SEEDS, PLANTED, Arm, at_equal_compute
from limbeck.errors import RecipeError, nearest
from limbeck.evaluate import Benchmark
from limbeck.evaluate.agreement import Agreement
from limbeck.evaluate.bits_per_byte import BitsPerByte
from limbeck.plugins import Extensible
from limbeck.recipe import Recipe, parse_recipe
from limbeck.report.collect import REFERENCES, TEACHER_OF
from limbeck.spec import Spec, load_yaml, member_of, merge, override, validate
from limbeck.store import Codec, Exact, HiddenCodec
from limbeck.teachers import ModelTeacher

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OF_THE_STUDY = {
    "seed": "seeds are the study's: set `seeds`",
    "evaluate": "all arms are measured alike: set base.evaluate",
    "capture": "a teacher is captured once for all arms: set the study's `capture`",
}
TEXT = (Agreement, BitsPerByte)
"""Benchmarks that measure what an arm may have been trained for. They can't decide a study."""


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


class Primary(Spec):
    """What decides the study, declared before its first run: one metric on a task that no arm is trained for."""

    benchmark: str
    """One of base.evaluate, by its name."""
    metric: str = ""
    """The benchmark's first metric where it is empty."""
    margin: float = Field(gt=0)
    """Differences within this are as good as none: what TIES means, in the metric's own unit."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """How often all comparisons together may find a lead that is none."""
    baseline: str = ""
    """The arm that others are compared with; the first of cross-entropy alone where it is empty."""
    compare: list[tuple[str, str]] = []
    """Pairs of arms that are judged, as [arm, with]. Every arm with the baseline where it is empty. Fewer pairs leave each more power."""
    equal_compute: bool = False
    """Also train the baseline with as many floating-point operations as each arm that is compared with it takes, its teacher and parent
    included, and compare with that: in arms named by their length, as `sft-36-steps`."""
    planted: dict[str, Any] = {}
    """The known handicap, as changes of the baseline; a quarter of its steps where it is empty."""


class Tuning(Spec):
    """Each arm's learning rate, chosen on validation data by runs of their own."""

    learning_rates: list[float] = Field(min_length=2)
    """The grid of every arm."""
    of: dict[str, list[float]] = {}
    """Grids of arms that have another; of a single rate, which is taken as it is."""
    evaluate: member_of(Benchmark)  # type: ignore[valid-type]
    """What chooses: a benchmark on cases that base.evaluate does not have."""
    metric: str = ""
    """The benchmark's first metric where it is empty."""
    seed: int = Field(20_000, ge=0)
    """The seed of these runs; none of the study's."""

    @field_validator("learning_rates", "of")
    @classmethod
    def _rates(cls, value: Any) -> Any:
        for rates in value.values() if isinstance(value, dict) else [value]:
            if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
                raise ValueError(f"found {rates}, expected rates above 0, none twice")
        return value


class Study(Extensible):
    """Arms x seeds."""

    name: str
    """Names the directory of results: letters, digits, dot, dash, underscore."""
    question: str = ""
    """What the study is to find out: the headline of its report."""
    base: str | dict[str, Any]
    """The recipe that all arms share, or the path of its YAML file, seen from the study's file. Its `seed` and `capture` are not used."""
    arms: dict[str, dict[str, Any]]
    """By name, what an arm changes in the base: mappings are merged, lists and values replaced. `student: {arm: NAME}` starts from the
    student of another arm, seed by seed; `teacher: {model: NAME}` learns from another teacher."""
    seeds: list[int] = [0]
    """Every arm is trained with each of these."""
    num_seeds: dict[str, int] = {}
    """Arms that are trained with the first few seeds only."""
    primary: Primary | None = None
    """What decides. Where it is not set, the report describes and gives no verdict."""
    tune: Tuning | None = None
    """How each arm's learning rate is chosen; recipes keep theirs where it is not set."""
    capture: TeacherCapture | None = None
    """Where it is set (`{}` will do), a teacher scores the data once for all arms that have it; else each arm runs it anew."""
    references: bool = True
    """Also measure the teachers themselves and the student before training."""

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
            if not _SAFE_NAME.fullmatch(arm) or arm in REFERENCES or arm.startswith(TEACHER_OF):
                taken = " and ".join((*REFERENCES, TEACHER_OF + "..."))
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

    @model_validator(mode="after")
    def _named_arms(self) -> Study:
        """Whatever names an arm names one that is there."""
        for arm, changes in self.arms.items():
            parent = _parent(changes)
            if parent is not None:
                self._known(f"arm {arm!r}: student.arm", parent)
                path = [arm]
                while parent is not None:
                    if parent in path:
                        raise ValueError(f"arm {arm!r}: student.arm leads in a circle: {' from '.join([*path, parent])}")
                    path.append(parent)
                    parent = _parent(self.arms.get(parent, {}))
        for arm, count in self.num_seeds.items():
            self._known("num_seeds", arm)
            if not 0 < count <= len(self.seeds):
                raise ValueError(f"num_seeds.{arm}: found {count}, expected 1 to {len(self.seeds)}, the number of seeds")
        for arm in self.tune.of if self.tune else ():
            self._known("tune.of", arm)
        if self.tune and self.tune.seed in self.seeds:
            raise ValueError(
                f"tune.seed: found {self.tune.seed}, which is one of `seeds`; expected another, or rates are chosen on the test"
            )
        if self.primary:
            self._known("primary.baseline", self.baseline)
            controls = [self.baseline + AGAIN, self.baseline + PLANTED]
            if taken := [name for name in controls if name in self.arms]:
                raise ValueError(f"found arm {taken[0]!r}, which the study adds itself as a control; give the arm another name")
            for pair in self.primary.compare:
                for arm in pair:
                    self._known("primary.compare", arm)
                if pair[0] == pair[1]:
                    raise ValueError(f"primary.compare: found {pair[0]!r} with itself, expected two arms")
        return self

    def _known(self, key: str, arm: Any) -> None:
        if not isinstance(arm, str) or arm not in self.arms:
            raise ValueError(f"{key}: found {arm!r}, expected an arm of the study: {', '.join(self.arms)}{nearest(str(arm), self.arms)}")

    @property
    def baseline(self) -> str:
        """The arm that others are compared with: as declared, or the first of cross-entropy alone, or the first."""
        if self.primary and self.primary.baseline:
            return self.primary.baseline
        plain = [arm for arm, changes in self.arms.items() if _parent(changes) is None and _terms(changes) == ["ce"]]
        return (plain or list(self.arms))[0]

    @property
    def compared(self) -> list[tuple[str, str]]:
        """The pairs that are judged."""
        if self.primary and self.primary.compare:
            return list(self.primary.compare)
        return [(arm, self.baseline) for arm in self.arms if arm != self.baseline]

    def plan(self, where: str = "study") -> dict[str, Arm]:
        """Every arm, parents before children, and the controls where something is judged; an error names the arm."""
        base = load_yaml(self.base) if isinstance(self.base, str) else self.base
        shared = {key: value for key, value in base.items() if key not in ("seed", "capture")}
        trees: dict[str, dict[str, Any]] = {}
        waiting = dict(self.arms)
        while waiting:
            arm = next(name for name, changes in waiting.items() if _parent(changes) in (None, *trees))
            changes = waiting.pop(arm)
            if parent := _parent(changes):
                above = trees[parent].get("student")  # of another kind, the parent's own recipe is refused
                begun = {key: value for key, value in above.items() if key != "lora"} if isinstance(above, dict) else {}
                student = {key: value for key, value in changes["student"].items() if key != "arm"}
                changes = {**changes, "student": {**student, **begun}}
            trees[arm] = merge(shared, changes)
        arms = {
            name: Arm(name, self._recipe(name, tree, where), self._seeds_of(name), _parent(self.arms[name])) for name, tree in trees.items()
        }
        if self.primary:
            self._check_primary(arms, where)
            arms |= self._as_costly(arms, trees[self.baseline], where)
            arms |= self._controls(arms[self.baseline], trees[self.baseline], where)
        if self.tune:
            self._check_tuning(arms[self.baseline].recipe, where)
        return arms

    def recipes(self, where: str = "study") -> dict[str, Recipe]:
        """Every arm's recipe, controls included, resolved and validated. The seed is that of the first run."""
        return {name: arm.recipe for name, arm in self.plan(where).items()}

    def _seeds_of(self, arm: str) -> list[int]:
        return self.seeds[: self.num_seeds.get(arm, len(self.seeds))]

    def _recipe(self, arm: str, tree: dict[str, Any], where: str) -> Recipe:
        recipe = parse_recipe(tree | {"seed": self.seeds[0]}, where=f"{where}: arm {arm!r}")
        try:
            recipe.for_training()
        except RecipeError as error:
            raise RecipeError(f"{where}: arm {arm!r}: {error}") from None
        if self.capture and not isinstance(recipe.teacher, ModelTeacher):
            found = recipe.teacher.type
            raise RecipeError(
                f"{where}: arm {arm!r}: capture is set, and the teacher is {found!r}; expected {{type: model, model: NAME}}, or no capture"
            )
        return recipe

    def _as_costly(self, arms: Mapping[str, Arm], tree: dict[str, Any], where: str) -> dict[str, Arm]:
        """The baseline at the cost of arms that are compared with it; one of equal length serves several."""
        found: dict[str, Arm] = {}
        if self.primary is None or not self.primary.equal_compute:
            return found
        against = [arm for arm, other in self.compared if other == self.baseline]
        for name, (length, its) in at_equal_compute(arms, self.baseline, against, where).items():
            if name in self.arms:
                raise RecipeError(f"{where}: found arm {name!r}, which primary.equal_compute adds; give the arm another name")
            recipe, seeds = self._recipe(name, merge(tree, {"train": length}), where), max((arms[arm].seeds for arm in its), key=len)
            found[name] = Arm(name, recipe, seeds, arms[self.baseline].parent, at_cost_of=its)
        return found

    def _controls(self, baseline: Arm, tree: dict[str, Any], where: str) -> dict[str, Arm]:
        assert self.primary is not None
        again, planted = baseline.name + AGAIN, baseline.name + PLANTED
        seeds = [seed + OTHER_SEEDS for seed in baseline.seeds]
        _, train = baseline.recipe.for_training()
        fewer = {"epochs": train.epochs / 4} if train.epochs else {"steps": max((train.steps or 1) // 4, 1)}
        handicap = merge(tree, self.primary.planted or {"train": fewer})
        return {
            again: Arm(again, baseline.recipe.model_copy(update={"seed": seeds[0]}), seeds, baseline.parent, "again"),
            planted: Arm(planted, self._recipe(planted, handicap, where), baseline.seeds, baseline.parent, "planted"),
        }

    def _check_primary(self, arms: Mapping[str, Arm], where: str) -> None:
        assert self.primary is not None
        recipe = arms[self.baseline].recipe
        found = {benchmark.key: benchmark for benchmark in recipe.evaluate}
        benchmark = found.get(self.primary.benchmark)
        if benchmark is None:
            known = f"{', '.join(found) or 'none is there'}{nearest(self.primary.benchmark, found)}"
            raise RecipeError(f"{where}: primary.benchmark: found {self.primary.benchmark!r}, expected one of base.evaluate: {known}")
        if isinstance(benchmark, TEXT):
            raise RecipeError(
                f"{where}: primary.benchmark: {self.primary.benchmark!r} measures likeness on text, which is what arms are trained for: it "
                "can't be primary; expected a task that no arm is trained on"
            )
        benchmark.metric_named(self.primary.metric, f"{where}: primary.metric")
        for name, arm in arms.items():
            best = arm.recipe.chosen_by
            if best is not None and _cases(best) == _cases(benchmark):
                raise RecipeError(
                    f"{where}: arm {name!r}: train.best.benchmark: found {best.key!r}, which has the cases of primary.benchmark "
                    f"{benchmark.key!r}, so students would be chosen on the test; expected validation cases, such as another `seed` or file"
                )

    def _check_tuning(self, recipe: Recipe, where: str) -> None:
        assert self.tune is not None
        self.tune.evaluate.metric_named(self.tune.metric, f"{where}: tune.metric")
        chosen = _cases(self.tune.evaluate)
        if same := [benchmark.key for benchmark in recipe.evaluate if _cases(benchmark) == chosen]:
            raise RecipeError(
                f"{where}: tune.evaluate has the cases of base.evaluate's {same[0]!r}, so rates would be chosen on the test; "
                "expected others, such as another `seed` or file"
            )


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """The study in a YAML file, its base read and every arm validated; torch-free."""
    path = Path(path)
    tree = load_yaml(path)
    if "arms" not in tree and "source" in tree:
        raise RecipeError(f"{path}: found a recipe, expected a study; `limbeck train {path}` trains it")
    if isinstance(tree.get("base"), str):
        tree["base"] = load_yaml(path.parent / tree["base"])
    study = validate(Study, override(tree, overrides), str(path))
    study.plan(str(path))
    return study


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _parent(changes: Mapping[str, Any]) -> str | None:
    student = changes.get("student")
    return student.get("arm") if isinstance(student, dict) else None


def _terms(changes: Mapping[str, Any]) -> list[Any]:
    objective = changes.get("objective")
    return [term.get("type") for term in objective if isinstance(term, dict)] if isinstance(objective, list) else []


def _cases(benchmark: Benchmark) -> Any:
    """What decides a benchmark's cases; how many of them, and how they are asked, does not tell them apart."""
    keys = {"type", "task", "data", "seed", "categories", "tasks"}
    tree = json.loads(benchmark.model_dump_json())
    return {key: value for key, value in tree.items() if key in keys}
