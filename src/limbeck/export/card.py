"""The model card: what a student was made from, how, and how good it is, as the run's files tell. Folders are shown by their last name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from limbeck.assets.catalog import list_assets
from limbeck.cache import resolve_model
from limbeck.errors import LimbeckError
from limbeck.report.collect import TEACHER_NLL, named
from limbeck.run import Run
from limbeck.store.manifest import read_manifest

TEMPLATE = Path(__file__).parent / "card.md.j2"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
UNKNOWN = "not known to Limbeck"


@dataclass(frozen=True)
class Row:
    """One metric of one benchmark."""

    benchmark: str
    kind: str
    metric: str
    value: float
    stderr: float | None
    num_items: int
    higher_is_better: bool


def model_card(run: Run, name: str) -> str:
    """The text of README.md. `name` is the repository or folder that the reader will load."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    recipe = run.read_json("recipe.json")
    config = json.loads((run.student / "config.json").read_text(encoding="utf-8"))
    models, data_names = _models(recipe), _data(recipe["source"])
    licences = {f"{role}, {public(model)}": model_licence(model) for role, model in models.items()}
    known = {licence.lower() for licence in licences.values()}
    licences |= {f"data, {public(each)}": _catalogued(each) for each in data_names}
    title, rows, text = name.rpartition("/")[2], list(results(run)), yaml.safe_dump(public(recipe), sort_keys=False, allow_unicode=True)
    card = ModelCardData(
        base_model=[model for model in dict.fromkeys(models.values()) if HUB_NAME.fullmatch(model) and not Path(model).exists()] or None,
        # where student and teacher have the same one; anything else is for people to read
        license=licence if len(known) == 1 and re.fullmatch(r"[a-z0-9.-]+", licence := next(iter(known))) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["limbeck", "knowledge-distillation"],
        model_name=title,
        eval_results=[EvalResult("text-generation", row.kind, row.benchmark, row.metric, row.value) for row in rows] or None,
    )
    card_text = ModelCard.from_template(
        card,
        template_path=str(TEMPLATE),
        title=title,
        facts=[(key, _cell(value)) for key, value in _facts(run, recipe, models, data_names)],
        results=[[_cell(cell) for cell in _result(row)] for row in rows],
        model=json.dumps(name),
        is_chat=(run.student / "chat_template.jinja").is_file(),
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
        licences=[(_cell(of), licence) for of, licence in licences.items()],
        version=run.read_json("environment.json")["packages"].get("limbeck", ""),
        recipe=text.strip(),
        # longer than any fence inside
        fence="`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text) or [""])),
    )
    return str(card_text)


def results(run: Run) -> Iterator[Row]:
    """Everything that was measured of the student and has a value."""
    for name, result in run.evals().items():
        for metric, found in result["metrics"].items():
            if found["value"] is not None and metric != TEACHER_NLL:
                kind = result["settings"].get("type", name)
                yield Row(name, kind, metric, found["value"], found["stderr"], found["num_items"], found["higher_is_better"])


def model_licence(name: str) -> str:
    """What a model's own card or Limbeck's catalogue says of its licence."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    try:
        folder = Path(resolve_model(name))
        card = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(str(folder), "README.md")
        if isinstance(card, str | Path) and Path(card).is_file():
            return ModelCard.load(Path(card)).data.license or _catalogued(name)
    except (LimbeckError, OSError, ValueError, yaml.YAMLError):  # moved since, or a card that is no card
        pass
    return _catalogued(name)


def public(value: Any) -> Any:
    """A value, or a tree of them, without the folders of this machine, and without rows that were given in memory."""
    if isinstance(value, dict):
        return {key: f"{len(item)} rows" if key == "rows" and isinstance(item, list) else public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "./", "../")) else value


def _catalogued(name: str) -> str:
    return next((asset.licence for asset in list_assets() if asset.name == name), UNKNOWN)


def _models(recipe: dict[str, Any]) -> dict[str, str]:
    """The models that the student was made from, by their part in it."""
    models = {"student before training": recipe["student"]["model"]}
    teacher = recipe["teacher"]
    if "model" in teacher:
        models["teacher"] = teacher["model"]
    elif teacher["type"] == "store":
        try:
            models["teacher"] = read_manifest(teacher["path"]).teacher.name
        except LimbeckError:  # a capture that is not there any more
            models["teacher"] = teacher["path"]
    return models


def _data(source: dict[str, Any]) -> list[str]:
    """The data sets' names; rows that were given in memory have none."""
    data = source.get("data") or []
    parts = data if isinstance(data, list) else [data]
    names = [part if isinstance(part, str) else part.get("path") or part.get("hub") or "rows in memory" for part in parts]
    return [str(name) for name in names]


def _facts(run: Run, recipe: dict[str, Any], models: dict[str, str], data_names: list[str]) -> Iterator[tuple[str, Any]]:
    data, totals, student, train = run.read_json("data.json"), run.read_json("run.json"), recipe["student"], recipe["train"]
    pruned = [f"blocks {student['keep_layers']} kept"] if student.get("keep_layers") else []
    pruned += [f"pruned to {student['num_layers']} blocks"] if student.get("num_layers") else []
    bits = [f"in {recipe['teacher']['load_in']}"] if recipe["teacher"].get("load_in") else []
    for role, model in models.items():
        yield role, ", ".join([public(model), *(pruned if role.startswith("student") else bits)])
    if lora := student.get("lora"):
        yield "trained", _adapters(lora)
    counts = [f"{data[key]:,} {words}" for key, words in (("num_samples", "conversations"), ("num_scored", "scored tokens")) if key in data]
    yield "data", ", ".join([*map(public, data_names), *counts])
    yield "objective", " + ".join(_term(term) for term in recipe["objective"] if term["weight"])
    optimizer = train["optimizer"]
    yield "training", f"{totals['steps']} steps of {train['batch_size']} conversations, learning rate {optimizer['learning_rate']:g}"
    if best := totals.get("best"):
        by = f"{' '.join(dict.fromkeys((best['benchmark'], best['metric'])))} ({best['value']:.4g}), which is therefore too good"
        yield "chosen", f"as after step {best['step']}, chosen by {by}"
    yield "tokens seen", f"{totals['tokens']:,} in {totals['train_seconds']:,.0f} s"
    yield "precision, seed", f"{train['precision']}, {recipe['seed']}"


def _adapters(lora: dict[str, Any]) -> str:
    where = "all linear layers" if lora["targets"] == "all-linear" else ", ".join(lora["targets"])
    return f"{'DoRA' if lora['dora'] else 'LoRA'} of rank {lora['rank']}, alpha {lora['alpha']:g}, on {where}; merged into the weights"


def _term(term: dict[str, Any]) -> str:
    settings = ", ".join(f"{key}: {named(value)}" for key, value in term.items() if key not in ("type", "weight") and value is not None)
    return f"{term['weight']:g} {term['type']}" + (f" ({settings})" if settings else "")


def _result(row: Row) -> list[Any]:
    value = f"{row.value:.4g}" + (f" ± {row.stderr:.2g}" if row.stderr is not None else "")
    return [row.benchmark, f"{row.metric} {'↑' if row.higher_is_better else '↓'}", value, row.num_items]


def _cell(value: Any) -> str:
    """Text that stays in its cell."""
    return " ".join(str(value).replace("|", "\\|").split())
