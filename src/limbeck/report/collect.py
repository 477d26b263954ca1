"""Evidence: what lies in the directory of a study, or of a single run, read once. Nothing is computed here and nothing written.

study.json     name, question, seeds, protocol, every arm's resolved recipe, and an index of records
records/       finished runs and references                    arms/ARM/seed-N/   runs without a record
capture.json   what the capture took                           references/NAME/   the same of references
capture-NAME.json   the same of a teacher that some arms have for themselves
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from limbeck.errors import RunError
from limbeck.report.records import FOLDER, RunRecord, checked, of_run, read_record
from limbeck.report.stats import Pair
from limbeck.run import Run, what_is_learned

TEACHER_NLL = "teacher_nll"
"""A metric that says nothing of the model that was graded: it is kept for the comparison with the teacher, and out of the tables."""

TEACHER, UNTRAINED = "teacher", "untrained"
TEACHER_OF = "teacher-of-"
"""Before an arm's name: a teacher that it has for itself."""
REFERENCES = (TEACHER, UNTRAINED)
"""Rows that are no arms, in every study; a study with several teachers has one more for each, behind the first."""


def capture_file(teacher: str) -> str:
    """Where it is told what the capture of a teacher took."""
    return "capture.json" if teacher == TEACHER else f"capture-{teacher}.json"


@dataclass(frozen=True)
class Evidence:
    """A study's or a run's directory. `arms` holds the runs that were started, by arm and then by seed."""

    path: Path
    is_study: bool
    name: str
    question: str
    seeds: list[int]
    recipes: dict[str, dict[str, Any]]
    arms: dict[str, list[RunRecord]]
    references: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    captures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By teacher: what its capture took."""
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By arm: its `role` (arm, again, planted), `parent` and `seeds`, and where it has one of its own, its `teacher`."""
    first: str | None = None
    """The baseline that the study declares."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """What was declared before the first run, with its `sha256`."""
    amendments: list[dict[str, Any]] = field(default_factory=list)
    """What was declared otherwise after it: `changes` and the `protocol` since then."""
    tuning: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By arm: validation scores of the rates that were `tried`, and the one `chosen`."""

    @property
    def judged(self) -> dict[str, Any]:
        """The protocol that holds: the last one."""
        return dict(self.amendments[-1]["protocol"]) if self.amendments else self.protocol

    def of_role(self, role: str) -> str | None:
        """The arm of a role: the control `again` or `planted`."""
        return next((arm for arm, about in self.about.items() if about.get("role") == role), None)

    def teacher_of(self, arm: str) -> str:
        """The name of an arm's teacher among the references. It names files too, so it leads nowhere else."""
        name = str(self.about.get(arm, {}).get("teacher", TEACHER))
        return name if name.startswith(TEACHER_OF) and Path(name).name == name else TEACHER

    @property
    def teachers(self) -> list[str]:
        """The study's teacher, and those that arms have for themselves."""
        return list(dict.fromkeys([TEACHER, *map(self.teacher_of, self.recipes)]))

    def method(self, arm: str) -> str:
        """What an arm optimises, and from which teacher where that is its own."""
        text, its = objective_text(self.recipes[arm]), self.recipes[arm].get("teacher", {})
        return text if self.teacher_of(arm) == TEACHER else f"{text} from {model_name(its.get('model') or its.get('type', ''))}"

    @property
    def finished(self) -> dict[str, list[RunRecord]]:
        """Finished runs by arm; an arm without one is left out."""
        found = {arm: [run for run in runs if run.is_finished] for arm, runs in self.arms.items()}
        return {arm: runs for arm, runs in found.items() if runs}

    @property
    def num_expected(self) -> int:
        return sum(len(self.about.get(arm, {}).get("seeds", self.seeds)) for arm in self.recipes)

    @property
    def num_finished(self) -> int:
        return sum(map(len, self.finished.values()))

    @property
    def baseline(self) -> str | None:
        """The arm that the others are compared with: the first that is plain fine-tuning (cross-entropy alone), else the first."""
        if self.first is not None:
            return self.first if len(self.recipes) > 1 else None
        plain = [arm for arm, recipe in self.recipes.items() if [term["type"] for term in terms(recipe)] == ["ce"]]
        return (plain or list(self.recipes))[0] if len(self.recipes) > 1 else None

    @property
    def apart(self) -> dict[str, list[str]]:
        """Arms whose budget differs from the baseline's by declaration, with the keys that say so; none where nothing is declared."""
        if not self.judged.get("primary") or self.baseline is None:
            return {}
        base = self.recipes[self.baseline]
        found = {}
        for arm, recipe in self.recipes.items():
            keys = ["student.arm"] if self.about.get(arm, {}).get("parent") else []
            keys += [f"train.{key}" for key in ("steps", "epochs", "batch_size") if _at(recipe, "train", key) != _at(base, "train", key)]
            keys += [part for part in ("student", "source") if recipe.get(part) != base.get(part) and not (keys and part == "student")]
            if keys:
                found[arm] = keys
        return found

    @property
    def in_step(self) -> list[str]:
        """Arms that see the baseline's batches, step by step: its data, batch size and length, and for one seed its order."""
        keys = ("steps", "epochs", "batch_size")
        base = self.recipes[self.baseline or next(iter(self.recipes))]
        return [
            arm
            for arm, recipe in self.recipes.items()
            if recipe.get("source") == base.get("source")
            and all(_at(recipe, "train", key) == _at(base, "train", key) for key in keys)
            and self.about.get(arm, {}).get("role") != "again"
        ]

    def is_text(self, benchmark: str) -> bool:
        """Whether a benchmark measures likeness on held-out text, which is near what arms optimise, and no task."""
        types = {b.get("name") or b["type"]: b["type"] for recipe in self.recipes.values() for b in recipe.get("evaluate", [])}
        return types.get(benchmark, benchmark) in ("agreement", "bits_per_byte")

    def models(self) -> Iterator[tuple[str, list[dict[str, dict[str, Any]]]]]:
        """(label, evals per seed) of everything that was measured: references first, then arms."""
        for name, evals in self.references.items():
            if evals:
                yield name, [evals]
        for arm, runs in self.finished.items():
            if any(run.evals for run in runs):
                yield arm, [run.evals for run in runs]

    def benchmarks(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(benchmark, metric, an example of it) of all that was measured, in the recipe's order."""
        order = [b.get("name") or b["type"] for recipe in self.recipes.values() for b in recipe.get("evaluate", [])]
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for _, per_seed in self.models():
            for evals in per_seed:
                for name in sorted(evals, key=lambda name: order.index(name) if name in order else len(order)):
                    for metric, value in evals[name]["metrics"].items():
                        found.setdefault((name, metric), value)
        return [(name, metric, example) for (name, metric), example in found.items() if metric != TEACHER_NLL]

    def headlines(self) -> list[tuple[str, str, dict[str, Any]]]:
        """The first metric of each benchmark: what plots and summaries show; tables have all."""
        first: dict[str, tuple[str, str, dict[str, Any]]] = {}
        for entry in self.benchmarks():
            first.setdefault(entry[0], entry)
        return list(first.values())


def _at(recipe: dict[str, Any], section: str, key: str) -> Any:
    return (recipe.get(section) or {}).get(key)


def collect(path: Path) -> Evidence:
    """The evidence in a study's or a run's directory."""
    here = Run(path)
    if (path / "study.json").is_file():
        return _study(here)
    if (path / "recipe.json").is_file():
        recipe = here.read_json("recipe.json")
        record = of_run(path, path.name, recipe.get("seed", 0))
        return Evidence(path, False, path.name, "", [record.seed], {record.arm: recipe}, {record.arm: [record]})
    what = "found no study.json or recipe.json" if path.is_dir() else "no such directory"
    raise RunError(f"{path}: {what}, expected the directory of a study or a run")


def _study(here: Run) -> Evidence:
    study = here.read_json("study.json")
    if lacking := [key for key in ("name", "seeds", "recipes") if key not in study]:
        raise RunError(f"{here.path / 'study.json'}: found no {lacking[0]!r}, expected a file written by `limbeck study`")
    index, about = study.get("index", {}), study.get("arms", {})
    arms: dict[str, list[RunRecord]] = {}
    for arm in study["recipes"]:
        recorded = index.get("arms", {}).get(arm, {})
        seeds = about.get(arm, {}).get("seeds", study["seeds"])
        found = [_run_of(here.path, arm, seed, recorded.get(str(seed)), study["recipes"][arm]) for seed in seeds]
        arms[arm] = [record for record in found if record is not None]
    evidence = Evidence(
        path=here.path,
        is_study=True,
        name=study["name"],
        question=study.get("question", ""),
        seeds=study["seeds"],
        recipes=study["recipes"],
        arms=arms,
        about=about,
        first=study.get("baseline"),
        protocol=study.get("protocol", {}),
        amendments=study.get("amendments", []),
        tuning=index.get("tuning", {}),
    )
    captures = {name: took for name in evidence.teachers if (took := here.read_json(capture_file(name), {}))}
    return replace(evidence, captures=captures, references=_references(here, index, evidence.teachers) if study.get("references") else {})


def _run_of(path: Path, arm: str, seed: int, recorded: str | None, recipe: dict[str, Any]) -> RunRecord | None:
    """The record that the index names, or what lies in the run's directory so far, if that is of the arm as it is now."""
    if recorded is not None and (file := path / FOLDER / Path(recorded).name).is_file():
        return read_record(file)
    folder = path / "arms" / arm / f"seed-{seed}"
    return of_run(folder, arm, seed) if _is_of(recipe, Run(folder).read_json("recipe.json", {})) else None


def _is_of(recipe: dict[str, Any], there: dict[str, Any]) -> bool:
    """Whether a run was made of an arm's recipe, as far as the study does not change it: teachers are captured, rates are tuned."""
    arm, run = ({"train": {}, **what_is_learned(tree)} for tree in (recipe, there))
    train = [{key: value for key, value in tree["train"].items() if key != "optimizer"} for tree in (arm, run)]
    return train[0] == train[1] and all(arm.get(key) == run.get(key) for key in ("source", "objective"))


def _references(here: Run, index: dict[str, Any], teachers: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    found = {}
    for name in (*teachers, UNTRAINED):
        recorded, folder = index.get("references", {}).get(name), Run(here.path / "references" / name)
        file = here.path / FOLDER / Path(recorded).name if recorded else None
        found[name] = read_record(file).evals if file and file.is_file() else checked(folder.evals(), folder.path / "evals")
    return found


def terms(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The terms of a stored recipe that have a weight."""
    return [term for term in recipe.get("objective", []) if term.get("weight", 1.0) != 0]


def objective_text(recipe: dict[str, Any]) -> str:
    """A stored objective in a line: `ce + 0.5 logits (forward_kl, T 2)`, `logits (jsd, beta 0.1)`."""
    parts = []
    for term in terms(recipe):
        details = [named(term[key]) for key in ("divergence", "measure") if term.get(key)]
        if term.get("trust_threshold"):
            details.append(f"trusted from {term['trust_threshold']:g}")
        if term.get("temperature", 1.0) != 1.0:
            details.append(f"T {_amount(term['temperature'])}")
        weight = "" if term.get("weight", 1.0) == 1.0 else f"{_amount(term['weight'])} "
        parts.append(f"{weight}{term['type']}" + (f" ({', '.join(details)})" if details else ""))
    return " + ".join(parts) or "none"


def model_name(model: str) -> str:
    """The last part of a hub name or folder; of a run's `student`, the run as well."""
    parts = model.rstrip("/").split("/")
    return "/".join(parts[-2:] if parts[-1] == "student" else parts[-1:])


def _amount(value: Any) -> str:
    """A number, or the ends of a schedule: `1 to 0.2`."""
    return f"{value['start']:g} to {value['end']:g}" if isinstance(value, dict) else f"{value:g}"


def named(value: Any) -> str:
    """A member of a family as it was stored: its name, and its parameters where it has some."""
    if not isinstance(value, dict):
        return str(value)
    knobs = [f"{key} {knob:g}" for key, knob in value.items() if isinstance(knob, int | float) and not isinstance(knob, bool)]
    return ", ".join([str(value["type"]), *knobs, *(key for key, knob in value.items() if knob is True)])


def item_pairs(evals: dict[str, dict[str, Any]], benchmark: str, metric: str) -> dict[str, Pair]:
    """(sum, count) by item id of a metric; empty where the benchmark or the metric keeps none per item."""
    items = evals.get(benchmark, {}).get("items", [])
    return {item["id"]: (item["sums"][metric], item["counts"][metric]) for item in items if metric in item["sums"]}
