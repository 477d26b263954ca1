"""The demo, shortened to tiny models and a few steps, through the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.cli import main


@pytest.fixture
def command(make_model_dir: Callable[..., Path], write_jsonl: Callable[..., Path], tmp_path: Path) -> list[str]:
    """`limbeck demo` on models of 30 blocks and width 8, so that the shipped study's pruning and layer pairs hold as they are."""
    model = make_model_dir(layers=30, width=8, seed=3)
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"The answer is {i}, in Paris."}]}
        for i in range(6)
    ]
    choices = [{"id": f"c{i}", "passage": "", "question": "Where?", "choices": ["Paris", "the dog"], "answer": i % 2} for i in range(3)]
    data, piqa = write_jsonl(rows), write_jsonl(choices, "piqa.jsonl")
    changes = {
        "base.student.model": model,
        "base.teacher.model": model,
        "base.source.data": data,
        "base.train.steps": 2,
        "base.train.batch_size": 3,
        "base.evaluate.0.data": data,
        "base.evaluate.1.data": data,
        "base.evaluate.2.data": piqa,
        "base.evaluate.3.limit": 2,
    }
    return ["limbeck", "demo", *(f"{key}={value}" for key, value in changes.items()), "--out", str(tmp_path / "demo"), "--json"]


def _run(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.err


def test_demo_trains_three_arms_and_reports(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, shown = _run(command, monkeypatch, capsys)
    assert set(figures["scores"]) == {"teacher", "untrained", "sft", "logits", "hidden"}
    assert "One seed" in figures["statement"] and "no verdict" in figures["statement"]
    for name in ("html", "markdown"):
        assert Path(figures["report"][name]).is_file() and figures["report"][name] in shown
    for word in ("sft", "logits", "hidden", "±", "Budgets are equal"):
        assert word in shown
    arms = tmp_path / "demo" / "arms"
    before = {file: file.stat().st_mtime_ns for file in arms.rglob("metrics.jsonl")}
    assert len(before) == 3
    again, _ = _run(command, monkeypatch, capsys)
    assert again["scores"] == figures["scores"]
    assert {file: file.stat().st_mtime_ns for file in arms.rglob("metrics.jsonl")} == before
    more, _ = _run([*command, "--seeds", "2"], monkeypatch, capsys)
    assert more["num_runs"] == {"expected": 6, "finished": 6} and "no verdict" in more["statement"]
    assert {file: file.stat().st_mtime_ns for file in before} == before, "the first seed was trained again"
