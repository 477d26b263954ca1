"""Protocol: what a study declared before its first run, kept in study.json with everything that was changed after it.

A verdict is worth what was fixed before anything was seen: metric, margin, seeds, arms, grid. So the first declaration stays, with its
hash, and a later one is an amendment that the report shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck.arms import named_teachers
from limbeck.errors import RunError
from limbeck.report.collect import TEACHER
from limbeck.report.records import FOLDER
from limbeck.run import Run, differences, what_is_run, write_json
from limbeck.study import Study, digest

FILE = "study.json"
WORK = "work.json"
"""In the directory of weights, where results lie elsewhere: whose it is."""


def claim(study: Study, path: Path, results: Path) -> None:
    """Take the directories for this study, and write down what it is. Another study's, and other things', are refused."""
    for folder, file in dict.fromkeys(((results, FILE), (path, FILE if path == results else WORK))):
        there = Run(folder).read_json(file, {})
        if there and there.get("name") != study.name:
            raise RunError(f"{folder}: holds study {there.get('name')!r}, found {study.name!r}; choose another directory")
        if not there and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder}: exists and is no study's directory; choose another path")
    there = Run(results).read_json(FILE, {})
    plan, declared = study.plan(), declaration(study)
    teachers = named_teachers(plan, study.baseline)
    tree = {
        "format": "limbeck-study",
        "version": 2,
        "name": study.name,
        "question": study.question,
        "seeds": study.seeds,
        "references": study.references,
        "baseline": study.baseline,
        "arms": {
            name: {"role": arm.role, "parent": arm.parent, "seeds": arm.seeds}
            | ({"at_cost_of": arm.at_cost_of} if arm.at_cost_of else {})
            | ({"teacher": teachers[name]} if teachers[name] != TEACHER else {})
            for name, arm in plan.items()
        },
        "recipes": {
            name: {key: value for key, value in what_is_run(arm.recipe.to_json()).items() if key != "seed"} for name, arm in plan.items()
        },
        "index": there.get("index", {}),
        **_protocol(there, declared, any((results / FOLDER).glob("*-seed-*.json"))),
    }
    write_json(results / FILE, tree)
    if path != results:
        write_json(path / WORK, {"format": "limbeck-work", "name": study.name, "results": str(results)})


def declaration(study: Study) -> dict[str, Any]:
    """What is declared before the first run, and its hash. Questions and names are not part of it."""
    plan = study.plan()
    declared: dict[str, Any] = {
        "primary": declared_primary(study),
        "compared": [*map(list, study.compared), *([arm, name] for name, its in plan.items() for arm in its.at_cost_of)],
        "seeds": {name: arm.seeds for name, arm in plan.items()},
        "tune": json.loads(study.tune.model_dump_json()) if study.tune else None,
        "recipes": {name: what_is_run(arm.recipe.to_json()) for name, arm in plan.items()},
    }
    return {"sha256": digest(declared), **declared}


def declared_primary(study: Study) -> dict[str, Any] | None:
    """What decides. A key that came later is left out where it is not used, so that older declarations stay as they were."""
    if study.primary is None:
        return None
    tree = study.primary.model_dump(mode="json")
    return {key: value for key, value in tree.items() if key != "equal_compute" or value}


def index(results: Path, found: dict[str, Any]) -> None:
    """Say which records belong to the study as it is now."""
    write_json(results / FILE, Run(results).read_json(FILE) | {"index": found})


def _protocol(there: dict[str, Any], declared: dict[str, Any], has_runs: bool) -> dict[str, Any]:
    """The first declaration, and amendments made after the first run was recorded."""
    first = there.get("protocol")
    if first is None or not has_runs:
        return {"protocol": declared, "amendments": []}
    latest = there["amendments"][-1]["protocol"] if there["amendments"] else first
    changes = [line for key, line in differences(latest, declared) if key != "sha256"]
    if not changes:  # hashes may differ nevertheless: by a key that came later and is not used
        return {"protocol": first, "amendments": there["amendments"]}
    return {"protocol": first, "amendments": [*there["amendments"], {"changes": changes, "protocol": declared}]}
