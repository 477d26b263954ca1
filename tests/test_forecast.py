"""What a study will take: counted where it can be, measured or taken from recorded runs where it can't, and nothing is done."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import write_jsonl
from limbeck.cli import main
from limbeck.conduct import run_study
from limbeck.errors import RecipeError
from limbeck.forecast import forecast
from limbeck.plan import fit
from limbeck.plan.work import SLACK_MB
from limbeck.run import Run
from limbeck.study import Study


@pytest.fixture
def study(model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [{"messages": [{"role": "user", "content": "x " * n}, {"role": "assistant", "content": f"It is {n}."}]} for n in range(1, 9)]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    base = {
        "student": {"model": str(model_dir), "keep_layers": [0, 3]},
        "teacher": {"type": "model", "model": str(model_dir)},
        "source": {"type": "dataset", "data": data},
        "train": {"steps": 3, "batch_size": 4},
        "evaluate": [{"type": "bits_per_byte", "data": data}],
    }
    arms = {"sft": {"objective": [{"type": "ce"}]}, "logits": {"objective": [{"type": "logits"}], "train": {"steps": 2}}}
    return {"name": "tiny", "base": base, "arms": arms, "seeds": [0, 1], "num_seeds": {"logits": 1}}


def test_nothing_is_sought_that_a_forecast_does_not_show(study, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("limbeck.plan"), "_machine", lambda processes: 1.0)
    monkeypatch.setattr(fit, "cheapest", lambda *_: pytest.fail("what would fit takes minutes to find for a large model"))
    assert forecast(Study.model_validate(study), tmp_path / "s")["num_runs"] == 3


def test_what_cannot_be_read_is_named_with_its_arm(study, tmp_path):
    arms = study["arms"] | {"other": study["arms"]["sft"] | {"source": {"data": str(tmp_path / "nowhere.jsonl")}}}
    with pytest.raises(RecipeError, match=r"arm 'other': data .*nowhere\.jsonl"):
        forecast(Study.model_validate(study | {"arms": arms}), tmp_path / "s")


def test_counts_are_those_of_the_runs(study, tmp_path):
    expected = forecast(Study.model_validate(study), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert [(row["arm"], row["seed"], row["asks_teacher"]) for row in expected["runs"]] == [
        ("sft", 0, False),
        ("logits", 0, True),
        ("sft", 1, False),
    ]
    assert all(row["basis"] == "a timed matrix product" and row["train_seconds"] > 0 for row in expected["runs"])
    assert expected["evaluation_seconds"] is None, "nothing is known of it before a run"
    assert expected["num_recorded"] == 0 and expected["train_seconds"] == pytest.approx(sum(r["train_seconds"] for r in expected["runs"]))
    run_study(Study.model_validate(study | {"seeds": [0]}), tmp_path / "s")
    for arm in ("sft", "logits"):
        totals = Run(tmp_path / "s" / "arms" / arm / "seed-0").read_json("run.json")
        assert totals["tokens"] == next(row["tokens"] for row in expected["runs"] if row["arm"] == arm)
        weights = (tmp_path / "s" / "arms" / arm / "seed-0" / "student" / "model.safetensors").stat().st_size / 2**20
        assert next(row["disk_mb"] for row in expected["runs"] if row["arm"] == arm) - SLACK_MB == pytest.approx(weights, rel=0.05)
    left = forecast(Study.model_validate(study), tmp_path / "s")
    assert [(row["arm"], row["seed"], row["basis"]) for row in left["runs"]] == [("sft", 1, "a recorded run")]
    assert left["num_recorded"] == 2
    results = [json.loads(file.read_text()) for file in (tmp_path / "s").glob("**/records/[!r]*.json")]
    took = [sum(its["seconds"] for its in record["evals"].values()) for record in results]
    assert len(took) == 2 and min(took) > 0 and left["evaluation_seconds"] == pytest.approx(sum(took) / 2)


def test_the_command_line(study, tmp_path, capsys, monkeypatch):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    arguments = ["limbeck", "study", str(file), "--out", str(tmp_path / "work"), "--results", str(tmp_path / "results")]

    def command(*more: str) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr("sys.argv", [*arguments, *more, "--json"])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        captured = capsys.readouterr()
        return json.loads(captured.out.splitlines()[-1]), captured.err

    planned, shown = command("--dry-run")
    assert planned["num_runs"] == 3 and "3 runs to make, 0 recorded" in shown
    assert not (tmp_path / "work").exists() and not (tmp_path / "results").exists()
    figures, _ = command()
    assert Path(figures["report"]["html"]).parent == tmp_path / "results"
    assert len(list((tmp_path / "results" / "records").glob("[!r]*"))) == 3 and (tmp_path / "work" / "arms" / "sft" / "seed-1").is_dir()
    assert command("--dry-run")[0]["num_runs"] == 0
