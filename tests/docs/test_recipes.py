"""Every recipe and study that is shipped is valid, those for GPUs too, whose models and data are not here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from limbeck.recipe import load_recipe
from limbeck.study import load_study

ROOT = Path(__file__).parents[2]
FILES = sorted(
    file for folder in ("recipes", "src/limbeck/recipes") for file in (ROOT / folder).rglob("*.yaml") if "suites" not in file.parts
)


def test_there_are_some():
    names = {file.relative_to(ROOT).as_posix() for file in FILES}
    assert {"recipes/mini/exp1-smollm2/study.yaml", "src/limbeck/recipes/demo/study.yaml"} <= names
    assert len([name for name in names if name.startswith("recipes/paper/exp")]) == 4


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_it_is_valid(file, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    if "mini" in file.parts:  # what other recipes there make is not here
        made = re.sub(r"runs/\S+/student", "HuggingFaceTB/SmolLM2-135M-Instruct", file.read_text(encoding="utf-8"))
        file = tmp_path / "mini" / file.name
        file.parent.mkdir()
        file.write_text(made, encoding="utf-8")
    if "arms" not in yaml.safe_load(file.read_text(encoding="utf-8")):
        load_recipe(file)
        return
    study = load_study(file)
    if "paper" in file.parts or "mini" in file.parts:
        assert study.primary and study.question, "a study that is to decide says what decides"
        assert any(arm.endswith("sft") for arm in study.arms), "and has fine-tuning on the same tokens"
        # a student of 0.5 billion takes too long on two cores for five: those reports give no verdict across seeds, and say so
        assert len(study.seeds) >= 5 or study.base["student"]["model"] == "Qwen/Qwen2.5-Coder-0.5B-Instruct"


def test_no_test_question_is_trained_on(monkeypatch):
    """The data of the first experiment have no question of its tests, and the students' none of the teacher's."""
    import json

    from limbeck.evaluate import ExactMatch

    folder = ROOT / "recipes" / "mini" / "exp1-smollm2"
    study = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
    asked = set()
    for benchmark in (*study["base"]["evaluate"], study["tune"]["evaluate"]):
        asked |= {f"Question: {entry['question']}\nAnswer:" for entry in ExactMatch.model_validate(benchmark).entries().values()}
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in ("teacher", "additions")}
    prompts = {name: {row["prompt"] for row in its} for name, its in rows.items()}
    assert len(asked) == 150 + 100 - 21 and len(prompts["teacher"]) == 1600  # docs/experiments.md tells of the 21 that both ask
    assert not asked & (prompts["teacher"] | prompts["additions"]) and not prompts["teacher"] & prompts["additions"]
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in answers] == [row["prompt"] for row in rows["additions"]]
