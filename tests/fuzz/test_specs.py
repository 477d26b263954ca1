"""Recipes and studies of any shape are read, or refused in our own words."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz import STRANGE, changed, fuzzed, json_values
from limbeck.errors import LimbeckError
from limbeck.recipe import Recipe, check_files, load_recipe, parse_recipe
from limbeck.spec import override, validate
from limbeck.study import Study

RECIPE: dict[str, Any] = {
    "plugins": [],
    "student": {"model": "owner/student", "num_layers": 3, "revision": "main"},
    "teacher": {"type": "model", "model": "owner/teacher"},
    "source": {"type": "dataset", "data": ["data.jsonl", {"path": "more.jsonl", "limit": 3}], "max_length": 64},
    "objective": [
        {"type": "ce", "weight": 0.25},
        {"type": "logits", "temperature": 2, "divergence": {"type": "jsd", "beta": 0.1}},
        {"type": "hidden", "pairs": [[0, 1], [2, 5]]},
    ],
    "train": {
        "steps": 4,
        "batch_size": 2,
        "optimizer": {"learning_rate": "3e-5", "betas": [0.9, 0.99], "max_grad_norm": None},
        "max_skipped_steps": 2,
        "evaluate_every": 2,
        "evaluate_only": ["bits_per_byte"],
        "best": {"benchmark": "bits_per_byte", "metric": "bits_per_byte"},
        "report_to": [],
    },
    "evaluate": [{"type": "bits_per_byte", "data": "held-out.jsonl"}, {"type": "exact_match", "name": "exact", "task": "chain_sum"}],
    "capture": {"path": "captured", "codec": {"type": "topk", "k": 8}, "layers": [1, 5]},
    "seed": 7,
}
STUDY: dict[str, Any] = {
    "name": "s",
    "base": {key: value for key, value in RECIPE.items() if key not in ("capture", "seed", "objective")},
    "arms": {"sft": {"objective": [{"type": "ce"}]}, "kd": {"student": {"arm": "sft"}, "objective": [{"type": "logits"}]}},
    "seeds": [0, 1],
    "num_seeds": {"kd": 1},
    "primary": {"benchmark": "exact", "margin": 0.02},
    "tune": {"learning_rates": [1e-4, 1e-3], "evaluate": {"type": "exact_match", "task": "chain_sum", "seed": 9}},
    "capture": {"codec": {"type": "quantized"}},
}


def test_what_is_changed_below_is_good(tmp_path: Path) -> None:
    parse_recipe(RECIPE)
    validate(Study, STUDY, "study").plan()


@fuzzed(120)
@given(changed(RECIPE))
def test_recipes(tree: Any) -> None:
    with suppress(LimbeckError):
        recipe = parse_recipe(tree)
        assert isinstance(recipe, Recipe)
        assert validate(Recipe, recipe.to_json(), "again") == recipe
        check_files(recipe)


@fuzzed(60)
@given(changed(STUDY))
def test_studies(tree: Any) -> None:
    with suppress(LimbeckError):
        validate(Study, tree, "study").plan()


@fuzzed(40)
@given(st.one_of(st.text(max_size=60), json_values.map(json.dumps), st.binary(max_size=40), st.sampled_from(STRANGE)))
@example("[" * 3000)
@example("a: &a [*a]")
@example("? {a: b}\n: c")
@example("a: 0x" + "f" * 5000)
@example("1: 2\n")
@example("a: 2001-13-45")
@example("!!set {a, b}")
def test_yaml(tmp_path_factory: pytest.TempPathFactory, text: str | bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with suppress(LimbeckError):
        load_recipe(file)


KNOWN = ["train.steps", "objective.0.weight", "source.data", "train.optimizer.betas.1", "objective.9", "student"]
KEYS = st.one_of(st.sampled_from(KNOWN), st.text(max_size=9))


@fuzzed(60)
@given(KEYS, st.one_of(st.text(max_size=20), json_values.map(json.dumps)))
def test_overrides(key: str, value: str) -> None:
    with suppress(LimbeckError):
        validate(Recipe, override(RECIPE, [f"{key}={value}"]), "recipe")
