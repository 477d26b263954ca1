"""Recipe: everything that defines one run, in one YAML file. Torch-free: every error of a recipe comes before a model is loaded.

Sections check themselves; what spans them is checked in `consistency.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from limbeck.consistency import check_evaluations, check_objective, secret_in
from limbeck.errors import LimbeckError, RecipeError
from limbeck.evaluate import Benchmark
from limbeck.objectives import HiddenTerm, Needs, Term
from limbeck.objectives.base import active, needs_of
from limbeck.parallel import Parallel
from limbeck.plugins import Extensible
from limbeck.sources import Source
from limbeck.spec import Spec, load_yaml, member_of, override, validate
from limbeck.store import Codec, Exact, HiddenCodec
from limbeck.store.choose import Target
from limbeck.store.manifest import Manifest, has_manifest, read_manifest, refuse_foreign, refuse_other
from limbeck.store.place import Place
from limbeck.student import Student
from limbeck.teachers import NoTeacher, Teacher
from limbeck.training import Train

LATER: tuple[tuple[str, str, Any], ...] = (
    ("", "plugins", []), ("train", "max_skipped_steps", 0),
    ("train", "evaluate_every", None), ("train", "evaluate_only", None), ("train", "best", None),
)  # fmt: skip
"""Section, key and default of what was added since runs are recorded by the hash of their recipe."""


class Capture(Spec):
    """What `limbeck capture` writes. It walks the source, and the texts on which `evaluate` asks the teacher."""

    path: str
    """The store's folder."""
    codec: member_of(Codec) = Exact()  # type: ignore[valid-type]
    """How the teacher's output is kept."""
    target_kl: float | None = Field(None, gt=0)
    """Choose how much the codec keeps by measuring: as little as has at most this KL(teacher, what comes back) on documents that it was not
    fitted on. The codec is `quantized` where none is set."""
    bytes_per_token: float | None = Field(None, gt=1)
    """The same for bytes: as much as takes at most so many per scored token."""
    hidden: member_of(HiddenCodec) | None = None  # type: ignore[valid-type]
    """How hidden states are kept; in the teacher's dtype where it is not set."""
    batch_size: int = Field(8, gt=0)
    """Conversations per forward of the teacher."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Teacher blocks whose states are kept, from 0; those that the objective maps where it is not set."""
    samples_per_shard: int = Field(256, gt=0)
    """Conversations per file, rounded up to whole batches: what a kill can cost."""
    calibrate_on: int = Field(64, gt=0)
    """Conversations of the source on which codecs are fitted, at most half of them. What is lost is measured on others."""

    @model_validator(mode="before")
    @classmethod
    def _loses_something(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and "codec" not in tree and (tree.get("target_kl") or tree.get("bytes_per_token")):
            return {**tree, "codec": {"type": "quantized"}}
        return tree

    @model_validator(mode="after")
    def _one_target(self) -> Capture:
        given = [name for name in ("target_kl", "bytes_per_token") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError("found both target_kl and bytes_per_token, expected one of them")
        if given and not self.codec.tuned:
            able = ", ".join(name for name, codec in Codec.members.items() if codec.tuned)
            raise ValueError(f"{given[0]}: codec {self.codec.type!r} has nothing to choose; set capture.codec to one that has: {able}")
        if self.target_kl and self.codec.support == "sampled":
            raise ValueError("target_kl: draws have no KL, as what was not drawn is not ruled out; set bytes_per_token, or another codec")
        if given and (value := getattr(self.codec, self.codec.tuned)) != type(self.codec).model_fields[self.codec.tuned].default:
            raise ValueError(
                f"found both {given[0]} and codec.{self.codec.tuned} = {value:g}, which {given[0]} is to choose; expected one of them"
            )
        return self

    @property
    def folder(self) -> Path:
        return Path(os.path.expanduser(self.path))

    @property
    def target(self) -> Target | None:
        if self.target_kl is None and self.bytes_per_token is None:
            return None
        return Target(kl=self.target_kl, bytes_per_token=self.bytes_per_token)

    def codec_in(self, manifest: Manifest) -> dict[str, Any]:
        """Fields of the manifest that this section asks for; with a target, the codec as it was chosen for it."""
        if self.target is None:
            return {"codec": self.codec}
        kept = {self.codec.tuned: getattr(manifest.codec, self.codec.tuned, None)}
        return {"target": self.target.model_dump(), "codec": self.codec.model_copy(update=kept)}


class Recipe(Extensible):
    """One run."""

    plugins: list[str] = []
    """Modules of your own that define terms, divergences, teachers, sources or benchmarks. They are imported before the rest is read, from
    the working directory or from what is installed; nothing else is, so read them before you run a recipe of somebody else's."""
    student: Student | None = None
    """The model to be trained; a recipe that only captures needs none."""
    teacher: member_of(Teacher) = NoTeacher()  # type: ignore[valid-type]
    """Who scores the tokens."""
    source: member_of(Source)  # type: ignore[valid-type]
    """Who writes the tokens."""
    objective: list[member_of(Term)] = []  # type: ignore[valid-type]
    """The weighted terms of the loss."""
    train: Train | None = None
    parallel: Parallel = Parallel()
    evaluate: list[member_of(Benchmark)] = []  # type: ignore[valid-type]
    """Benchmarks of the trained student."""
    capture: Capture | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    """Fixes data order and projections; the same seed gives the same run."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if where := secret_in(self.to_json()):
            raise ValueError(
                f"{where}: found a URL that holds a key or a password, which would be written down; expected it in the environment"
            )
        names = [benchmark.key for benchmark in self.evaluate]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"evaluate: found {sorted(repeated)[0]!r} twice; give one of them another `name`")
        if needy := [benchmark.key for benchmark in self.evaluate if benchmark.needs_teacher and not self.teacher.provides().output]:
            raise ValueError(
                f"evaluate: {needy[0]!r} compares with a teacher, and teacher is {self.teacher.type!r}; set teacher, or remove it"
            )
        check_objective(self)
        check_evaluations(self)
        vocabulary, k = self.teacher.provides().vocabulary, getattr(self.capture.codec, "k", 0) if self.capture else 0
        if vocabulary is not None and k > vocabulary:
            raise ValueError(f"capture.codec.k: found {k}, expected at most {vocabulary}, the tokens of the teacher")
        return self

    @property
    def terms(self) -> dict[str, Term]:
        """Terms of positive weight by key."""
        return active(self.objective)

    @property
    def during(self) -> list[Benchmark]:
        """Benchmarks that are asked during training."""
        if self.train is None or self.train.evaluate_every is None:
            return []
        only = self.train.evaluate_only
        return [benchmark for benchmark in self.evaluate if only is None or benchmark.key in only]

    @property
    def chosen_by(self) -> Benchmark | None:
        """The benchmark by which the student is chosen among those that evaluations saw."""
        best = self.train.best if self.train else None
        return next((benchmark for benchmark in self.during if best and benchmark.key == best.benchmark), None)

    def for_training(self) -> tuple[Student, Train]:
        """The sections that training needs."""
        for key, value in (("student", self.student), ("train", self.train), ("objective", self.objective or None)):
            if value is None:
                raise RecipeError(f"{key}: missing; expected it in a recipe that trains")
        assert self.student is not None and self.train is not None
        return self.student, self.train

    def for_capture(self) -> tuple[Capture, Needs, HiddenCodec]:
        """The capture section, what is to be captured of the source, and how its hidden states are kept."""
        if self.capture is None:
            raise RecipeError("capture: missing; expected a section with the `path` of the store to write")
        if not self.teacher.computes:
            able = ", ".join(repr(name) for name, teacher in Teacher.members.items() if teacher.computes)
            raise RecipeError(
                f"teacher.type: found {self.teacher.type!r}, expected one of {able}: only a teacher that computes is captured"
            )
        if problem := self.teacher.refuses_codec(self.capture.codec, self.capture.target is not None):
            raise RecipeError(f"capture.codec: {problem}")
        refuse_foreign(self.capture.path)
        provided = self.teacher.provides()
        layers = self.capture.layers
        if layers is None:
            shape = self.student.shape() if self.student else None
            if shape and provided.num_layers:
                layers = sorted(needs_of(self.terms, shape[0], provided.num_layers).layers)
            elif any(isinstance(term, HiddenTerm) for term in self.terms.values()):
                raise RecipeError("capture.layers: missing; the number of blocks of student and teacher is not known here, so name them")
            else:
                layers = []
        if provided.layers is not None and (beyond := sorted(set(layers) - provided.layers)):
            expected = (
                f"0 to {max(provided.layers)}, the teacher's blocks" if provided.layers else f"none of a {self.teacher.type!r} teacher"
            )
            raise RecipeError(f"capture.layers: found {beyond[0]}, expected {expected}")
        dtype = getattr(self.teacher, "dtype", None)
        hidden = self.capture.hidden or HiddenCodec.members[dtype or "float32"]()  # type: ignore[call-arg]
        if has_manifest(Place(self.capture.path)):
            manifest = read_manifest(self.capture.path)
            needed = {
                "teacher.dtype": dtype,
                "teacher.load_in": getattr(self.teacher, "load_in", None),
                "layers": tuple(sorted(set(layers))),
                "hidden": hidden,
                **self.capture.codec_in(manifest),
            }
            refuse_other(self.capture.path, manifest, needed)
        return self.capture, Needs(output=True, layers=frozenset(layers)), hidden

    def to_json(self) -> dict[str, Any]:
        """The resolved recipe: every default spelled out, but for keys that came `LATER`, so that its hash is what it was before them."""
        tree = dict(json.loads(self.model_dump_json()))
        for section, key, default in LATER:
            node = tree.get(section) if section else tree
            if node and node.get(key) == default:
                del node[key]
        return tree


def tokenizer_name(recipe: Recipe) -> tuple[str, str | None]:
    """Name and revision of the tokenizer that renders the data: the student's, else the teacher's."""
    if recipe.student is not None:
        return recipe.student.model, recipe.student.revision
    if (named := recipe.teacher.speaks) is None:
        raise RecipeError("student: missing; expected a model whose tokenizer renders the data")
    return named  # type: ignore[no-any-return]


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key.path=value` overrides."""
    tree = load_yaml(path, overrides)
    if "arms" in tree:
        raise RecipeError(
            f"{path}: found a study, expected a recipe; `limbeck study {path}` trains its arms, with --dry-run it says what they take"
        )
    return validate(Recipe, tree, str(path))


def is_study(path: str | Path) -> bool:
    """Whether a YAML file holds a study, and no recipe. Overrides do not count: they reach into a base that may be a file of its own."""
    return "arms" in load_yaml(path)


def parse_recipe(recipe: Recipe | dict[str, Any] | str | Path, overrides: Iterable[str] = (), where: str = "recipe") -> Recipe:
    """A recipe from a mapping, a YAML file, or one that is already parsed, with `key.path=value` overrides."""
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides)
    if isinstance(recipe, Recipe):
        overrides = list(overrides)
        return validate(Recipe, override(recipe.to_json(), overrides), where) if overrides else recipe
    return validate(Recipe, override(recipe, overrides), where)


def require_files(recipe: Recipe, where: str = "recipe") -> None:
    """Refuse a recipe that names something that is not there."""
    if problems := check_files(recipe):
        raise RecipeError(f"{where}: " + "; ".join(problems))


def check_files(recipe: Recipe) -> list[str]:
    """What a recipe names that is not there (data, models that are neither local nor a hub name, a benchmark's cases, a tracker's
    package); messages, empty where all is well."""
    problems = []
    checks: list[Callable[[], object]] = [recipe.student.check] if recipe.student else []
    if recipe.train:
        checks.append(recipe.train.check)
    for check in (*checks, recipe.teacher.check, recipe.source.check, *(benchmark.check for benchmark in recipe.evaluate)):
        try:
            check()
        except LimbeckError as error:
            problems.append(str(error))
    return problems
