"""Starter recipes: a small tree of values for each method, written out with the specs' own docstrings as comments."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from limbeck.errors import RecipeError, nearest
from limbeck.recipe import Recipe
from limbeck.spec import class_at
from limbeck.study import Study

WIDTH = 110
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
STUDENT = {"model": MODEL, "num_layers": 14}
TEACHER = {"type": "model", "model": MODEL}
SOURCE = {"type": "dataset", "data": "limbeck/demo-train", "max_length": 192}
OPTIMIZER = {"learning_rate": 3e-4, "schedule": "cosine"}
TRAIN = {"steps": 300, "batch_size": 8, "micro_batch_size": 4, "checkpoint_every": 100, "optimizer": OPTIMIZER}
HELD_OUT = {"data": "limbeck/demo-heldout", "max_length": 192}
BITS_PER_BYTE, AGREEMENT = {"type": "bits_per_byte", **HELD_OUT}, {"type": "agreement", **HELD_OUT}
CE, LOGITS, HIDDEN = {"type": "ce", "weight": 0.2}, {"type": "logits", "divergence": "forward_kl"}, {"type": "hidden", "measure": "mse"}


def _recipe(*objective: dict[str, Any], teacher: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    scored = {"teacher": teacher} if teacher else {}
    evaluate = [AGREEMENT, BITS_PER_BYTE] if teacher else [BITS_PER_BYTE]
    return {"student": STUDENT, **scored, "source": SOURCE, "objective": list(objective), "train": TRAIN, "evaluate": evaluate, **sections}


def _study() -> dict[str, Any]:
    base = _recipe(teacher=TEACHER)
    del base["objective"]
    arms = {
        "sft": {"objective": [{"type": "ce"}]},
        "logits": {"objective": [CE, LOGITS]},
        "hidden": {"objective": [{"type": "ce"}, HIDDEN]},
    }
    question = "Is it better to distil or to fine-tune, and by which signal?"
    return {"name": "my-study", "question": question, "base": base, "arms": arms, "seeds": [0], "capture": {}}


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("Supervised fine-tuning: the data alone. What every distillation is compared with.", _recipe({"type": "ce"})),
    "logits": ("Logit distillation with the teacher in memory: its distribution at every token.", _recipe(CE, LOGITS, teacher=TEACHER)),
    "logits-offline": (
        "Logit distillation from a capture: the teacher scores the data once, for many students.\n"
        "  limbeck capture {file}\n"
        "  limbeck train {file} teacher='{{type: store, path: runs/teacher}}' --out runs/offline",
        _recipe(CE, LOGITS, teacher=TEACHER, capture={"path": "runs/teacher"}),
    ),
    "hidden": (
        "Hidden-state distillation: the student's blocks follow the teacher's.",
        _recipe({"type": "ce"}, HIDDEN, teacher=TEACHER),
    ),
    "lora": (
        "Fine-tuning of low-rank adapters that stays near the model it began with: the teacher is that model, which is the student\n"
        "with its adapters switched off, so that it takes no memory of its own. Needs: pip install 'limbeck[lora]'",
        _recipe({"type": "ce"}, {**LOGITS, "weight": 0.2}, teacher=TEACHER, student={"model": MODEL, "lora": {"rank": 8, "alpha": 16}}),
    ),
    "study": ("A study: the same data, budget and teacher for several methods, and a report.\n  limbeck study {file}", _study()),
}


def init(method: str = "logits", path: str | Path | None = None) -> Path:
    """Write the starter recipe of a method to a new file; returns its path."""
    if method not in METHODS:
        raise RecipeError(f"method {method!r}: expected one of: {', '.join(METHODS)}{nearest(method, METHODS)}")
    path = Path(path or ("study.yaml" if method == "study" else "recipe.yaml"))
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(starter(method, str(path)))
    except FileExistsError:
        raise RecipeError(f"{path}: exists, and is not overwritten; choose another file with --out") from None
    except OSError as error:
        raise RecipeError(f"{path}: could not be written ({error.strerror})") from None
    return path


def starter(method: str, file: str = "recipe.yaml") -> str:
    """The text of a method's starter recipe."""
    about, tree = METHODS[method]
    verb = [] if "limbeck capture" in about or "limbeck study" in about else [f"  limbeck train {file}"]
    head = [*about.format(file=file).splitlines(), *verb, "Every other key has a default; `limbeck schema` lists them for editors."]
    writer = _Writer([f"# {line}" for line in head])
    for key, value in tree.items():
        writer.lines.append("")
        writer.key(Study if method == "study" else Recipe, key, value, "")
    return "\n".join(writer.lines) + "\n"


@dataclass
class _Writer:
    """Lines of YAML. A comment that has been made stands for its like further down."""

    lines: list[str]
    said: set[str] = field(default_factory=set)

    def key(self, cls: type[BaseModel] | None, key: str, value: Any, indent: str) -> None:
        """`key: value` under its docstring; sections and lists of sections line by line."""
        inside = Recipe if cls is Study and key == "base" else class_at(cls, {key: value}, (key,)) if cls else None
        doc = cls.model_fields[key].description if cls else None
        self.comment(doc or ("" if key == "type" else _about(inside)), indent)
        if cls is Study and key == "arms":
            self.lines += [f"{indent}{key}:", *(f"{indent}  {arm}: {_flow(changes)}" for arm, changes in value.items())]
        elif isinstance(value, dict) and value:
            self.lines.append(f"{indent}{key}:")
            if "type" in value:
                self.comment(_about(inside), indent + "  ")
            for name, inner in value.items():
                self.key(inside, name, inner, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            self.lines.append(f"{indent}{key}:")
            for position, item in enumerate(value):
                member = class_at(cls, {key: value}, (key, position)) if cls else None
                self.comment(_about(member), indent + "  ")
                start = len(self.lines)
                for name, inner in item.items():
                    self.key(member, name, inner, indent + "    ")
                self.lines[start] = f"{indent}  - {self.lines[start].strip()}"
        else:
            self.lines.append(f"{indent}{key}: {_flow(value)}")

    def comment(self, text: str, indent: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self.lines += [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - len(indent))]


def _about(cls: type[BaseModel] | None) -> str:
    """The first paragraph of a section's docstring."""
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split()) if cls else ""


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).strip().removesuffix("...").strip()
