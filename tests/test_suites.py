"""Suites by name, for models without a recipe."""

from __future__ import annotations

import pytest
import yaml

from limbeck.errors import RecipeError
from limbeck.suites import load_suite, names


@pytest.mark.parametrize("name", names())
def test_every_suite_is_valid(name):
    assert load_suite(name) and len({benchmark.key for benchmark in load_suite(name)}) == len(load_suite(name))


def test_names():
    assert {"core", "published", "tools"} <= set(names())
    assert [benchmark.key for benchmark in load_suite("published")] == ["bbh", "musr", "mmlu_pro", "mmlu", "gpqa", "ifeval"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"evaluate": []}, "evaluate is empty"),
        ({"evaluate": [{"type": "agreement", "data": "x"}]}, "'agreement' compares with a teacher"),
        ({"evaluat": []}, "did you mean 'evaluate'"),
    ],
)
def test_files_of_ones_own(tmp_path, tree, message):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(RecipeError, match=message):
        load_suite(str(file))


def test_unknown_names():
    with pytest.raises(RecipeError, match="found 'cor', expected a YAML file or one of: core, published, tools; did you mean 'core'"):
        load_suite("cor")
