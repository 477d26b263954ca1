"""Starter recipes: each is valid as it stands, explains itself in the specs' words, and overwrites nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from limbeck.check import check
from limbeck.errors import RecipeError
from limbeck.init import METHODS, init, starter
from limbeck.recipe import Recipe
from limbeck.study import Study
from limbeck.training import Train


@pytest.mark.parametrize("method", METHODS)
def test_starter_passes_the_check(method: str, demo_cache: Path, tmp_path: Path) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    found = check(init(method, tmp_path / f"{method}.yaml"))
    terms = {"sft": {"ce"}, "hidden": {"ce", "hidden"}}.get(method, {"ce", "logits"})
    assert found["kind"] == "study" or set(found["objective"]) == terms


@pytest.mark.parametrize("method", METHODS)
def test_starter_holds_its_values_and_a_comment_for_each_key(method: str) -> None:
    """Comments are the specs' own docstrings: what stands over a key is what its spec says of it."""
    text = starter(method, "mine.yaml")
    assert yaml.safe_load(text) == METHODS[method][1]
    assert max(map(len, text.splitlines())) <= 140
    flat = " ".join(text.replace("#", " ").split())
    tree, cls = METHODS[method][1], Study if method == "study" else Recipe
    for key in tree:
        section = {"train": Train}.get(key)
        doc = cls.model_fields[key].description or (section.__doc__ if section else "")
        assert " ".join(doc.split()) in flat, key
    assert " ".join((Train.model_fields["batch_size"].description or "").split()) in flat
    assert "limbeck study mine.yaml" in text if method == "study" else "limbeck train mine.yaml" in text


def test_offline_starter_names_the_commands_with_braces_intact() -> None:
    assert "limbeck train r.yaml teacher='{type: store, path: runs/teacher}' --out runs/offline" in starter("logits-offline", "r.yaml")


def test_existing_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("mine")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: exists, and is not overwritten; choose another file with --out"):
        init("sft", file)
    assert file.read_text() == "mine"


def test_unknown_method_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"method 'hiden': expected one of: sft, .*; did you mean 'hidden'"):
        init("hiden", tmp_path / "recipe.yaml")
    assert not list(tmp_path.iterdir())


def test_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"could not be written \(No such file"):
        init("sft", tmp_path / "nowhere" / "recipe.yaml")


def test_default_file_is_named_after_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [str(init("study")), str(init())] == ["study.yaml", "recipe.yaml"]
