"""Makes this study's data: questions of reasoning-gym's `basic_arithmetic` with their right answers, none of them a test's.

    python recipes/mini/exp1-smollm2/rows.py

`teacher.jsonl` tunes the teacher on additions, `additions.jsonl` is what students learn from, and `subtractions.jsonl` the same on a task
that the teacher was not tuned on. The three have no question in common.
"""

from __future__ import annotations

import json
from pathlib import Path

import reasoning_gym
import yaml

HERE = Path(__file__).parent
NUM_ROWS = {"teacher": 1600, "additions": 480, "subtractions": 480}
POOL = 6000
OF = {"teacher": "+", "additions": "+", "subtractions": "-"}
SETTINGS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "allow_parentheses": False, "allow_negation": False}


def main() -> None:
    taken = tested()
    for name, count in NUM_ROWS.items():
        pool = reasoning_gym.create_dataset("basic_arithmetic", size=POOL, seed=1, operators=[OF[name]], **SETTINGS)
        rows = []
        for entry in pool:
            if len(rows) < count and entry["question"] not in taken:
                taken.add(entry["question"])
                rows.append({"prompt": f"Question: {entry['question']}\nAnswer:", "completion": f" {entry['answer']}"})
        assert len(rows) == count, f"{name}: {len(rows)} of {count} rows; a larger POOL has more"
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tested() -> set[str]:
    """The questions on which the studies here test or choose a learning rate."""
    from limbeck.evaluate import ExactMatch

    found: set[str] = set()
    for file in sorted(HERE.glob("study*.yaml")):
        study = yaml.safe_load(file.read_text(encoding="utf-8"))
        for benchmark in [*study["base"]["evaluate"], study.get("tune", {}).get("evaluate", {})]:
            if benchmark.get("type") == "exact_match":
                found |= {entry["question"] for entry in ExactMatch.model_validate(benchmark).entries().values()}
    return found


if __name__ == "__main__":
    main()
