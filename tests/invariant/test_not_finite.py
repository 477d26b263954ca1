"""A step that is infinite or no number stops the run or is skipped, changes nothing, and can be replayed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from helpers import make_tokenizer, save_model, tiny_model, write_jsonl
from limbeck.errors import RunError
from limbeck.ledger import Ledger
from limbeck.study import Study

BAD = "~"
"""A character of one conversation, at which the teacher knows no number."""


@pytest.fixture(scope="module")
def base(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    teacher, tokenizer = tiny_model(layers=2, width=48, seed=2, tied=False), make_tokenizer()
    (token,) = tokenizer(BAD, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        teacher.model.embed_tokens.weight[token] = torch.nan
    rows = [{"prompt": f"Add {n} and {n}.", "completion": f" The answer is {2 * n}{BAD if n == 2 else '.'}!"} for n in range(4)]
    return {
        "student": {"model": str(make_model_dir(layers=1, seed=1))},
        "teacher": {"type": "model", "model": str(save_model(tmp_path_factory.mktemp("teacher"), teacher, tokenizer))},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows))},
        "objective": [{"type": "ce"}, {"type": "logits"}],
        "train": {"steps": 8, "batch_size": 1, "checkpoint_every": 1, "keep_checkpoints": 9, "optimizer": {"learning_rate": 0.01}},
    }


@pytest.fixture(scope="module")
def skipped(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> limbeck.Run:
    """Two epochs of four conversations of which one is bad."""
    return limbeck.train(base, tmp_path_factory.mktemp("runs") / "skipped", ["train.max_skipped_steps=1"])


def test_skipped_steps_are_counted_and_change_nothing(skipped: limbeck.Run) -> None:
    rows = skipped.metrics()
    assert [row["step"] for row in rows] == list(range(1, 9))
    bad = [row["step"] for row in rows if row.get("skipped")]
    assert len(bad) == 2 == skipped.read_json("run.json")["skipped_steps"]
    assert all(("loss" in row) == (row["step"] not in bad) for row in rows)
    for line in skipped.metrics_file.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for step in bad:
        before, after = (skipped.checkpoints / f"step-{number:08d}" for number in (step - 1, step))
        for name in ("learner.safetensors", "optimizer.safetensors") if before.exists() else ():
            ours, theirs = load_file(before / name), load_file(after / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert rows[-1]["tokens"] > rows[-2]["tokens"]


def test_a_step_is_replayed_sample_by_sample(skipped: limbeck.Run, base: dict[str, Any]) -> None:
    found = limbeck.replay(skipped.path)
    assert not found["is_finite"] and found["step"] == max(row["step"] for row in skipped.metrics() if row.get("skipped"))
    assert "logits nan" in found["was"]
    ((row,)) = found["samples"]
    assert row["first"] == "teacher: output" and row["sums"]["logits"] == "nan" and row["sums"]["ce"] > 0 and row["grad_norm"] == "nan"
    json.dumps(found, allow_nan=False)


def test_it_stops_where_nothing_else_is_said_and_says_how_to_replay(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run, step \d: loss nan, gradient norm nan, logits nan: not finite.*`limbeck replay") as caught:
        limbeck.train(base, tmp_path / "run", ["train.batch_size=4"])
    assert "lower learning rate" in str(caught.value)
    run = limbeck.Run(tmp_path / "run")
    found = limbeck.replay(run.path)
    assert found["step"] == 1 and [row["first"] for row in found["samples"]].count("teacher: output") == 1
    assert sum(row["first"] == "" for row in found["samples"]) == 3
    (state,) = run.not_finite.glob("step-00000000/state.json")
    assert len(json.loads(state.read_text())["samples"]) == 4


def test_too_many_in_a_row_stop_the_run_also_after_a_resume(base: dict[str, Any], tmp_path: Path) -> None:
    settings = ["train.batch_size=4", "train.max_skipped_steps=2"]
    for _ in range(2):  # the second begins behind the two that are skipped
        with pytest.raises(RunError, match=r"step 3: .*; 2 before it were skipped, as many as train\.max_skipped_steps allows"):
            limbeck.train(base, tmp_path / "run", settings)
        assert [row["skipped"] for row in limbeck.Run(tmp_path / "run").metrics()] == [1, 1]


@pytest.mark.parametrize("settings", [["train.steps=1"], ["train.steps=3"], ["train.steps=3", "train.checkpoint_every=1"]], ids=str)
def test_weights_that_are_not_finite_stop_the_run_and_are_named(base: dict[str, Any], tmp_path: Path, settings: list[str]) -> None:
    """No later step could be right, so none is skipped; and nothing of them is written."""
    sft = {**base, "teacher": {"type": "none"}, "objective": [{"type": "ce"}], "train": {"batch_size": 1, "max_skipped_steps": 5}}
    sft["train"]["optimizer"] = {"learning_rate": 1e38, "weight_decay": 100.0, "warmup_fraction": 0.0}
    with pytest.raises(RunError, match=r"after step 1 weights are infinite or no number \(student\.model\.\S+, .* and \d+ more\), so noth"):
        limbeck.train(sft | {"train": sft["train"] | {"steps": 1}}, tmp_path / "run", settings)
    assert not list((tmp_path / "run").glob("*/step-*")) and not (tmp_path / "run" / "student").exists()


def test_a_run_without_such_a_step_has_none_to_replay(base: dict[str, Any], tmp_path: Path) -> None:
    sft = {**base, "teacher": {"type": "none"}, "objective": [{"type": "ce"}], "train": {"steps": 1}}
    run = limbeck.train(sft, tmp_path / "run")
    assert run.read_json("run.json")["skipped_steps"] == 0
    with pytest.raises(RunError, match=r"not-finite: no such folder; expected a run with a step that was not finite"):
        limbeck.replay(run.path)


def test_the_key_is_no_part_of_what_was_recorded_before_it(base: dict[str, Any], tmp_path: Path) -> None:
    def key(**train: Any) -> str:
        recipe = {**base, "train": {**base["train"], **train}}
        study = Study(name="s", base=recipe, arms={"sft": {"objective": [{"type": "ce"}]}})
        ledger = Ledger(study, tmp_path)
        return ledger.key(ledger.tasks()[0])

    assert "max_skipped_steps" not in limbeck.parse_recipe(base).to_json()["train"]
    assert key() == key(max_skipped_steps=0) != key(max_skipped_steps=1)
