"""Data sets as a source: several at once, by weight, filtered, and through the whole way to a run and a capture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import limbeck
from limbeck.errors import DataError, RecipeError
from limbeck.recipe import check_files

WORDS = ["weather", "Paris", "teacher", "student", "answer", "five", "fox", "dog", "sunny", "sleeps", "lazy", "quick"]
TEXTS = [{"text": " ".join(WORDS[i % 5 :] * (1 + i % 4))} for i in range(6)]
CHATS = [{"conversations": [{"from": "human", "value": WORDS[i]}, {"from": "gpt", "value": " ".join(WORDS[i:])}]} for i in range(4)]


def opened(tokenizer: Any, data: Any, seed: int = 0, **settings: Any) -> Any:
    return limbeck.parse_recipe({"source": {"type": "dataset", "data": data, **settings}}).source.open(tokenizer, seed)


def test_sets_without_weights_are_one(tokenizer: Any) -> None:
    together = opened(tokenizer, [{"rows": TEXTS}, {"rows": CHATS}])
    apart = [opened(tokenizer, {"rows": rows}) for rows in (TEXTS, CHATS)]
    assert [s.sample_id for s in together.samples] == [s.sample_id for source in apart for s in source.samples]
    assert sorted(s.sample_id for s in together.at(0, 10)) == sorted(s.sample_id for s in together.samples)
    assert together.steps_per_epoch(4) == 3
    assert together.describe()["formats"] == {"text": 6, "sharegpt": 4}


def test_weights_mix_by_conversations(tokenizer: Any) -> None:
    source = opened(tokenizer, [{"rows": TEXTS, "weight": 1}, {"rows": CHATS, "weight": 3}])
    texts = {sample.sample_id for sample in source.samples[:6]}
    drawn = Counter(sample.sample_id in texts for step in range(10) for sample in source.at(step, 8))
    assert drawn == {True: 20, False: 60}
    assert source.steps_per_epoch(8) == 3, "24 positions have all 6 texts, and the 4 chats many times"
    again = opened(tokenizer, [{"rows": TEXTS, "weight": 1}, {"rows": CHATS, "weight": 3}])
    assert [s.sample_id for s in again.at(7, 8)] == [s.sample_id for s in source.at(7, 8)]
    other = opened(tokenizer, [{"rows": TEXTS, "weight": 1}, {"rows": CHATS, "weight": 3}], seed=1)
    assert [s.sample_id for s in other.at(7, 8)] != [s.sample_id for s in source.at(7, 8)]


def test_what_became_of_the_rows_is_told(tokenizer: Any) -> None:
    data = [{"rows": [*TEXTS, *TEXTS], "limit": 8, "seed": 1}, {"rows": CHATS, "held_out": 0.5}]
    found = opened(tokenizer, data, max_length=40, min_length=8).describe()
    first, second = found["data"]
    assert (first["name"], first["rows_read"], first["rows_used"], first["formats"]) == ("rows", 12, 8, {"text": 8})
    assert second["rows_used"] + second["held_out"] == second["rows_read"] == 4
    assert first["samples"] + second["samples"] == found["num_samples"]
    assert found["num_rows"] == 8 + second["rows_used"]
    assert found["num_split"] > 0 and found["num_truncated"] == 0


def test_a_limit_is_over_all_sets(tokenizer: Any) -> None:
    whole, limited = (opened(tokenizer, [{"rows": TEXTS}, {"rows": CHATS}], **settings) for settings in ({}, {"limit": 8}))
    assert [s.sample_id for s in limited.samples] == [s.sample_id for s in whole.samples[:8]]


def test_impossible_settings_are_refused(tokenizer: Any) -> None:
    for settings, message in [
        ({"data": []}, "source.data: found nothing"),
        ({"data": 3}, "source.data: found 3, expected a file or the name of a data set, a mapping, or a list of these"),
        ({"data": {"pth": "x"}}, "source.data.pth: unknown key; did you mean 'path'?"),
        ({"data": [{"path": "x"}, {"path": "y", "format": "shargpt"}]}, "source.data.1.format: found 'shargpt'.*did you mean 'sharegpt'"),
        ({"data": [{"path": "x", "weight": 1}, "y"]}, "found `weight` in 1 of 2 data sets"),
        ({"data": [{"path": "x", "weight": 1}, {"path": "y", "weight": 1e9}]}, "expected none more than a million times another"),
        ({"data": [{"path": "x", "weight": 1}, {"path": "y", "weight": 1}], "limit": 3}, "found `limit` with weights"),
        ({"data": "x", "max_length": 8, "min_length": 9}, "min_length: found 9, expected at most max_length, 8"),
        ({"data": "x", "too_long": "splt"}, "too_long: found 'splt'.*did you mean 'split'"),
    ]:
        with pytest.raises(RecipeError, match=message):
            limbeck.parse_recipe({"source": {"type": "dataset", **settings}})
    with pytest.raises(DataError, match="rows: found no sample with a scored token, expected some for its weight"):
        opened(tokenizer, [{"rows": TEXTS, "weight": 1}, {"rows": [{"text": ""}], "weight": 1}])


def test_what_is_not_there_is_told_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = limbeck.parse_recipe({"source": {"type": "dataset", "data": [{"rows": CHATS}, {"path": "here.jsonl"}]}})
    assert "here.jsonl" in check_files(recipe)[0]
    (tmp_path / "here.jsonl").write_text("not read")
    assert check_files(recipe) == []
    recipe = limbeck.parse_recipe({"source": {"type": "dataset", "data": {"rows": CHATS, "convert": "nowhere_module:f"}}})
    assert "found no module 'nowhere_module'" in check_files(recipe)[0]


@pytest.fixture
def recipe(make_model_dir: Callable[..., Path]) -> dict[str, Any]:
    """Texts in pieces and chats in rows from Python, mixed and packed."""
    return {
        "student": {"model": str(make_model_dir(layers=2, seed=1))},
        "teacher": {"type": "model", "model": str(make_model_dir(layers=3, seed=2))},
        "source": {"type": "dataset", "data": [{"rows": TEXTS, "weight": 1}, {"rows": CHATS, "weight": 2}], "max_length": 24},
        "objective": [{"type": "ce"}, {"type": "logits"}],
        "train": {"steps": 4, "batch_size": 6, "micro_batch_size": 2, "pack_length": 48, "optimizer": {"learning_rate": 0.01}},
    }


def test_the_way_to_a_run_and_back_from_a_capture(recipe: dict[str, Any], tmp_path: Path) -> None:
    online = limbeck.train(recipe, tmp_path / "online")
    limbeck.capture(recipe | {"capture": {"path": str(tmp_path / "store")}})
    offline = limbeck.train(recipe | {"teacher": {"type": "store", "path": str(tmp_path / "store")}}, tmp_path / "offline")
    padded = limbeck.train(recipe, tmp_path / "padded", ["train.pack_length=null", "train.micro_batch_size=1"])
    losses = [[row["loss"] for row in run.metrics()] for run in (online, offline, padded)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert online.read_json("recipe.json")["source"]["data"][0]["rows"] == TEXTS
    again = limbeck.train(online.read_json("recipe.json"), tmp_path / "again")
    assert [row["loss"] for row in again.metrics()] == losses[0]


def test_a_benchmark_gets_the_rows_that_training_leaves_out(recipe: dict[str, Any], tokenizer: Any) -> None:
    data = {"rows": [*TEXTS, *CHATS], "held_out": 0.4}
    parsed = limbeck.parse_recipe(recipe | {"source": {"type": "dataset", "data": data}, "evaluate": [{"type": "agreement", "data": data}]})
    trained = {sample.sample_id for sample in parsed.source.open(tokenizer, 0).samples}
    measured = {sample.sample_id for sample in parsed.evaluate[0].samples(tokenizer)}
    assert trained and measured and not trained & measured
    assert len(trained) + len(measured) == 10
    with pytest.raises(RecipeError, match=r"evaluate.0.data: found `weight`, which is for training"):
        limbeck.parse_recipe(recipe | {"evaluate": [{"type": "agreement", "data": data | {"weight": 1}}]})


def test_the_same_rows_from_elsewhere_are_the_same_cases(write_jsonl: Callable[..., Path], recipe: dict[str, Any]) -> None:
    def fingerprint(data: Any) -> str:
        return limbeck.parse_recipe(recipe | {"evaluate": [{"type": "agreement", "data": data}]}).evaluate[0].fingerprint()

    file = str(write_jsonl(CHATS))
    assert fingerprint(file) == fingerprint({"path": file}) == fingerprint({"rows": CHATS}) != fingerprint({"rows": CHATS[1:]})
