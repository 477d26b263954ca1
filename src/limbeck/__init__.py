"""Limbeck: knowledge distillation of language models.

The command line's verbs are functions here, and nothing heavy loads before one is used.

import limbeck
run = limbeck.train("recipe.yaml", "runs/mine", overrides=["train.steps=100"])
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.assets import fetch
    from limbeck.capture import capture
    from limbeck.check import check
    from limbeck.conduct import run_study
    from limbeck.demo import demo
    from limbeck.errors import LimbeckError
    from limbeck.evaluate.runner import evaluate_model
    from limbeck.export import export
    from limbeck.init import init
    from limbeck.plan import plan
    from limbeck.recipe import Recipe, load_recipe, parse_recipe
    from limbeck.replay import replay
    from limbeck.report.page import build_report
    from limbeck.run import Run
    from limbeck.study import Study, load_study
    from limbeck.trainer import train

_WHERE = {
    "LimbeckError": "limbeck.errors",
    "Recipe": "limbeck.recipe",
    "Run": "limbeck.run",
    "Study": "limbeck.study",
    "build_report": "limbeck.report.page",
    "capture": "limbeck.capture",
    "check": "limbeck.check",
    "demo": "limbeck.demo",
    "evaluate_model": "limbeck.evaluate.runner",
    "export": "limbeck.export",
    "fetch": "limbeck.assets",
    "init": "limbeck.init",
    "load_recipe": "limbeck.recipe",
    "load_study": "limbeck.study",
    "parse_recipe": "limbeck.recipe",
    "plan": "limbeck.plan",
    "replay": "limbeck.replay",
    "run_study": "limbeck.conduct",
    "train": "limbeck.trainer",
}

__all__ = [
    "LimbeckError", "Recipe", "Run", "Study", "build_report", "capture", "check", "demo", "evaluate_model", "export", "fetch",
    "init", "load_recipe", "load_study", "parse_recipe", "plan", "replay", "run_study", "train",
]  # fmt: skip


class _Package(ModuleType):
    """Keeps `limbeck.capture` the function: importing `limbeck.capture`, the module, would bind that under the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
