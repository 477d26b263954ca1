"""A benchmark that is interrupted goes on behind what it had graded, and never behind what another model had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from helpers import tiny_model
from limbeck.errors import RunError
from limbeck.evaluate import Benchmark, Subject
from limbeck.evaluate.base import Item
from limbeck.evaluate.runner import evaluate

GRADED: list[str] = []


class Counting(Benchmark):
    """Twelve items, of which the one at `fails_at` interrupts."""

    type: Literal["counting"] = "counting"
    size: int = 12
    """Items that there are."""
    version: ClassVar[int] = 1
    higher_is_better: ClassVar[dict[str, bool]] = {"x": True}
    fails_at: ClassVar[int] = -1

    def run(self, subject: Subject) -> Iterator[Item]:
        for number in range(self.size):
            if f"i{number}" in subject.done:
                continue
            if number == Counting.fails_at:
                raise KeyboardInterrupt
            GRADED.append(f"i{number}")
            yield Item(f"i{number}", {"x": float(number)}, {"x": 1.0})


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "fails_at", -1)
    GRADED.clear()


def grade(tokenizer: Any, folder: Path, model: Any = None, **settings: Any) -> Any:
    subject = Subject(model or tiny_model(), tokenizer)
    (result,) = evaluate([Counting(**settings)], subject, folder)
    return result


def stopped(tokenizer: Any, folder: Path, at: int, **more: Any) -> Path:
    Counting.fails_at = at
    with pytest.raises(KeyboardInterrupt):
        grade(tokenizer, folder, **more)
    Counting.fails_at = -1
    GRADED.clear()
    return folder / "counting.partial.jsonl"


def test_it_goes_on_behind_what_was_graded(tokenizer, tmp_path):
    whole = grade(tokenizer, tmp_path / "whole")
    partial = stopped(tokenizer, tmp_path, 5)
    assert len(partial.read_text().splitlines()) == 1 + 5
    stopped(tokenizer, tmp_path, 9)
    result = grade(tokenizer, tmp_path)
    assert GRADED == ["i9", "i10", "i11"] and not partial.exists()
    assert result.items == whole.items and result.metrics == whole.metrics


def test_half_a_line_counts_for_nothing(tokenizer, tmp_path):
    partial = stopped(tokenizer, tmp_path, 5)
    partial.write_bytes(partial.read_bytes()[:-20])
    assert [item.id for item in grade(tokenizer, tmp_path).items] == [f"i{n}" for n in range(12)]
    assert GRADED[0] == "i4"


@pytest.mark.parametrize("change", ["model", "settings", "version", "damage"])
def test_what_another_left_is_not_taken(tokenizer, tmp_path, monkeypatch, change):
    partial = stopped(tokenizer, tmp_path, 5)
    more: dict[str, Any] = {}
    if change == "model":
        more["model"] = tiny_model(seed=9)
    elif change == "settings":
        more["size"] = 11
    elif change == "version":
        monkeypatch.setattr(Counting, "version", 2)
    else:
        lines = partial.read_text().splitlines()
        partial.write_text("\n".join([lines[0], json.dumps({"item": {"id": "i0"}}), *lines[2:]]) + "\n")
    result = grade(tokenizer, tmp_path, **more)
    assert GRADED[0] == "i0" and len(GRADED) == len(result.items)


def test_nothing_is_left_without_a_folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (result,) = evaluate([Counting()], Subject(tiny_model(), tokenizer))
    assert len(result.items) == 12 and not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_written(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((RunError, OSError), match="file"):
        grade(tokenizer, tmp_path / "file")
