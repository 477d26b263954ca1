"""What the protocol makes of runs: verdicts, the study's checks of itself, and the page that says so first."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import fake
import pytest

from limbeck.arms import OTHER_SEEDS
from limbeck.report.collect import collect
from limbeck.report.judge import forgotten, judge
from limbeck.report.page import build_report

NUM_ITEMS = 80
ARMS = {"sft": "arm", "logits": "arm", "sft-again": "again", "sft-planted": "planted"}
"""Arm and role; a study adds the last two."""


def result(share: float, seed: int, name: str = "sums", key: str = "") -> dict[str, Any]:
    """Answers of which this share is right: items are hard or easy for all, and an arm's seed shifts a few."""
    hard, own = random.Random("items"), random.Random(f"{key}{seed}")
    right = [float(hard.random() * 0.7 + own.random() * 0.3 < share) for _ in range(NUM_ITEMS)]
    items = [
        {
            "id": f"q{i:03}",
            "sums": {"accuracy": r},
            "counts": {"accuracy": 1.0},
            "detail": {"question": f"Q{i}", "text": "<b>7</b>", "expected": "8"},
        }
        for i, r in enumerate(right)
    ]
    value = sum(right) / NUM_ITEMS
    metric = {"value": value, "stderr": 0.05, "num_items": NUM_ITEMS, "higher_is_better": True, "chance": None}
    return {
        "name": name,
        "version": 1,
        "settings": {"type": "exact_match"},
        "metrics": {"accuracy": metric},
        "items": items,
        "seconds": 1.0,
    }


def study(path: Path, shares: dict[str, float], seeds: int = 5, amendments: list[dict[str, Any]] | None = None, **fewer: int) -> Path:
    """A study of a declared metric as it lies on disk; a share per arm, teacher and untrained student."""
    arms = {arm: role for arm, role in ARMS.items() if arm in shares}
    objectives = {"logits": [{"type": "ce", "weight": 0.2}, {"type": "logits"}]}
    recipes = {
        arm: fake.recipe("sft")
        | {"objective": objectives.get(arm, [{"type": "ce"}]), "evaluate": [{"type": "exact_match", "name": "sums"}]}
        for arm in arms
    }
    protocol = {
        "sha256": "f" * 64,
        "primary": {"benchmark": "sums", "metric": "accuracy", "margin": 0.1, "alpha": 0.05, "planted": {}},
        "compared": [["logits", "sft"]],
        "seeds": {arm: list(range(seeds)) for arm in arms},
        "tune": {"learning_rates": [1e-4, 3e-4], "evaluate": {"type": "exact_match", "name": "validation"}},
        "recipes": {},
    }
    about = {
        arm: {"role": role, "parent": None, "seeds": [OTHER_SEEDS * (role == "again") + seed for seed in range(fewer.get(arm, seeds))]}
        for arm, role in arms.items()
    }
    tuning = {"sft": {"tried": {"0.0001": 0.3, "0.0003": 0.2}, "chosen": 0.0001}}
    fake.write_json(
        path / "study.json",
        {
            "format": "limbeck-study",
            "version": 2,
            "name": "tiny",
            "question": "<i>Which?</i>",
            "seeds": list(range(seeds)),
            "references": True,
            "baseline": "sft",
            "arms": about,
            "recipes": recipes,
            "protocol": protocol,
            "amendments": amendments or [],
            "index": {"tuning": tuning},
        },
    )
    for arm in arms:
        for seed in about[arm]["seeds"]:
            folder = fake.run(path / "arms" / arm / f"seed-{seed}", "sft", seed)
            fake.write_json(folder / "recipe.json", recipes[arm] | {"seed": seed})
            for file in (folder / "evals").iterdir():
                file.unlink()
            fake.write_json(folder / "evals" / "sums.json", result(shares[arm], seed, key=arm))
    for name in ("teacher", "untrained"):
        if name in shares:
            fake.write_json(path / "references" / name / "evals" / "sums.json", result(shares[name], 0, key=name))
    return path


SOUND = {"sft": 0.45, "logits": 0.75, "sft-again": 0.45, "sft-planted": 0.1, "teacher": 0.9, "untrained": 0.1}


def judged(path: Path, shares: dict[str, float], **more: Any) -> Any:
    found = judge(collect(study(path, shares, **more)))
    assert found is not None
    return found


def test_a_lead_is_found_and_the_study_checks_out(tmp_path):
    its = judged(tmp_path / "s", SOUND)
    verdict = its.verdicts["logits", "sft"]
    assert verdict.outcome == "BEATS" and verdict.num_seeds == 5 and verdict.num_items == NUM_ITEMS
    assert its.state == "sound" and its.planted.outcome == "LOSES" and its.again.outcome in ("TIES", "INCONCLUSIVE")
    assert (its.again.components.num_sets, verdict.components.num_sets) == (2, 1), "only the A/A control shares no seed"
    assert 0.3 < its.gaps["logits"].value < 0.95 and set(its.gaps) == {"logits"}
    assert json.loads(json.dumps(its.to_json()))["comparisons"][0]["outcome"] == "BEATS"


def test_runs_that_were_asked_other_cases_are_not_judged(tmp_path):
    """A study that goes on after its cases were edited has results on both for a while: their items have the same ids."""
    path = study(tmp_path / "s", SOUND)
    for seed in (2, 3, 4):
        file = path / "arms" / "logits" / f"seed-{seed}" / "evals" / "sums.json"
        fake.write_json(file, json.loads(file.read_text()) | {"cases": "edited"})
    assert judge(collect(path)).verdicts["logits", "sft"].num_seeds == 2
    fake.write_json(path / "references" / "teacher" / "evals" / "sums.json", result(0.9, 0, key="teacher") | {"cases": "edited"})
    assert judge(collect(path)).gaps == {}


def test_the_gap_of_an_arm_is_to_its_own_teacher(tmp_path):
    path = study(tmp_path / "s", SOUND)
    tree = json.loads((path / "study.json").read_text())
    tree["arms"]["logits"]["teacher"] = "teacher-of-logits"
    fake.write_json(path / "study.json", tree)
    assert judge(collect(path)).gaps == {}, "not measured"
    for elsewhere in ("teacher-of-/../../other", "../other", ["x"], 7):
        tree["arms"]["logits"]["teacher"] = elsewhere
        fake.write_json(path / "study.json", tree)
        assert collect(path).teachers == ["teacher"], "names of files do not lead out of the study"
    tree["arms"]["logits"]["teacher"] = "teacher-of-logits"
    fake.write_json(path / "study.json", tree)
    fake.write_json(path / "references" / "teacher-of-logits" / "evals" / "sums.json", result(0.75, 0, key="own"))
    gaps = judge(collect(path)).gaps
    assert set(gaps) == {"logits"} and 0.8 < gaps["logits"].value < 1.2
    assert [name for name, _ in collect(path).models()][:3] == ["teacher", "teacher-of-logits", "untrained"]


@pytest.mark.parametrize(
    ("changes", "state"),
    [({"sft-again": 0.8}, "void"), ({"sft-again": 0.1}, "void"), ({"sft-planted": 0.45}, "powerless"), ({"sft-planted": 0.8}, "powerless")],
)
def test_controls_that_fail(tmp_path, changes, state):
    assert judged(tmp_path / "s", SOUND | changes).state == state


def test_controls_that_lack(tmp_path):
    assert judged(tmp_path / "one", SOUND, seeds=1).state == "unchecked"
    its = judged(tmp_path / "none", {arm: SOUND[arm] for arm in ("sft", "logits")})
    assert its.state == "unchecked" and its.again is None and its.gaps == {}


def test_an_arm_with_fewer_seeds_is_compared_on_them(tmp_path):
    assert judged(tmp_path / "s", SOUND, logits=3).verdicts["logits", "sft"].num_seeds == 3


def test_runs_are_matched_by_their_seeds(tmp_path):
    """Seed 1 of one arm is missing: the others are compared with their own seeds, and not with the next ones."""
    path = study(tmp_path / "s", SOUND, seeds=3)
    shutil.rmtree(path / "arms" / "logits" / "seed-1")
    its = judge(collect(path))
    evals = {arm: [result(SOUND[arm], seed, key=arm) for seed in (0, 2)] for arm in ("sft", "logits")}
    means = {arm: sum(its["metrics"]["accuracy"]["value"] for its in runs) / 2 for arm, runs in evals.items()}
    verdict = its.verdicts["logits", "sft"]
    assert verdict.num_seeds == 2 and verdict.value == pytest.approx(means["logits"] - means["sft"])


def test_pairs_without_runs_are_said_to_lack(tmp_path):
    path = study(tmp_path / "s", {"sft": 0.5, "sft-again": 0.5})
    its = judge(collect(path))
    assert its is not None and its.lacking == [("logits", "sft")] and its.verdicts == {}
    assert "Not judged yet, as runs are missing: logits and sft" in build_report(path).markdown.read_text()


def test_what_is_kept_and_gained(tmp_path):
    path = study(tmp_path / "s", SOUND, seeds=2)
    (sft, logits) = forgotten(collect(path))
    before = {item["id"]: item["sums"]["accuracy"] for item in result(SOUND["untrained"], 0, key="untrained")["items"]}
    right = {name for name, value in before.items() if value}
    after = [{i["id"]: i["sums"]["accuracy"] for i in result(SOUND["sft"], seed, key="sft")["items"]} for seed in (0, 1)]
    assert sft.before == len(right) and sft.kept == sum(run[name] for run in after for name in right) / 2
    assert sft.gained == sum(run[name] for run in after for name in run if name not in right) / 2 and logits.arm == "logits"


def test_the_page_says_what_was_decided_and_by_what(tmp_path):
    path = study(tmp_path / "s", SOUND)
    paths = build_report(path)
    markdown, html = paths.markdown.read_text(), paths.html.read_text()
    assert "logits BEATS sft" in markdown and "checks out" in markdown
    assert (
        "Declared before the first run: primary metric sums accuracy, margin 0.1" in markdown
        and "hash ffffffffffffffff" in markdown
        and "margin 0.1" in markdown
    )
    for title in ("Verdicts", "What could be wrong", "Kept and forgotten", "Learning rates", "Answers side by side"):
        assert f"## {title}" in markdown and f"<h2>{title}</h2>" in html
    assert "<b>7</b>" not in html and "<i>Which" not in html, "texts are never markup"
    assert "0.0001" in markdown and "chosen" in markdown
    figures = json.loads(paths.json.read_text())
    assert figures["judgement"]["state"] == "sound" and figures["protocol"]["sha256"] == "f" * 64


def test_a_void_study_says_so_first(tmp_path):
    path = study(tmp_path / "s", SOUND | {"sft-again": 0.8})
    markdown = build_report(path).markdown.read_text()
    assert markdown.index("THIS STUDY IS VOID") < markdown.index("BEATS")


def test_budgets_are_compared_in_what_is_not_declared_to_differ(tmp_path):
    """An arm that starts from another student must still see the same data, and the same amount of it."""
    path = study(tmp_path / "s", SOUND)
    declared = json.loads((path / "study.json").read_text())
    declared["recipes"]["logits"]["student"] = {"model": "other/student"}
    fake.write_json(path / "study.json", declared)
    for changes, equal in (
        ({"initial_weights_sha256": "c" * 64}, True),
        ({"initial_weights_sha256": "c" * 64, "data_sha256": "c" * 64}, False),
    ):
        for seed in range(5):
            folder = fake.run(path / "arms" / "logits" / f"seed-{seed}", "sft", seed, **changes)
            fake.write_json(folder / "recipe.json", declared["recipes"]["logits"])
        build_report(path)
        budgets = json.loads((path / "report.json").read_text())["budgets"]
        assert budgets["equal"] is equal
        assert "all arms had the same tokens of the data" in budgets["statement"] if equal else "tokens of the data" in budgets["statement"]
        assert "all arms had the same initial weights" not in budgets["statement"]


def test_a_void_study_calls_nothing_better(tmp_path):
    """Where one metric decides, its verdicts alone speak of it: a description by error bars over items would contradict them."""
    path = study(tmp_path / "s", SOUND | {"sft-again": 0.8})
    paths = build_report(path)
    figures = json.loads(paths.json.read_text())
    assert figures["judgement"]["state"] == "void" and not any("sums" in name for name in figures["findings"])
    assert "is better than" not in paths.html.read_text(encoding="utf-8")


def test_amendments_are_shown(tmp_path):
    protocol = {"sha256": "e" * 64, "primary": {"benchmark": "sums", "metric": "accuracy", "margin": 0.5, "alpha": 0.05, "planted": {}}}
    protocol |= {"compared": [["logits", "sft"]], "seeds": {"sft": [0]}, "tune": None}
    path = study(tmp_path / "s", SOUND, amendments=[{"changes": ["primary.margin is 0.1 there, 0.5 here"], "protocol": protocol}])
    markdown = build_report(path).markdown.read_text()
    assert "AMENDED after runs were made: primary.margin is 0.1 there, 0.5 here" in markdown
    first, last = markdown.index("Declared before the first run"), markdown.index("Judged by the last declaration")
    assert "margin 0.1" in markdown[first:last] and "margin 0.5" in markdown[last : last + 200], "each with its own margin"
    assert judge(collect(path)).margin == 0.5
