"""Makes this study's data: questions of reasoning-gym's `basic_arithmetic` with their right answers, none of them a test's.

    python recipes/mini/exp1-smollm2/rows.py                                            # questions and right answers
    python recipes/mini/exp1-smollm2/rows.py runs/exp1-smollm2/tuned/student            # the teacher's own answers to `additions.jsonl`

`teacher.jsonl` tunes the teacher on additions, and `additions.jsonl` is what students learn from. They have no question in common.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import reasoning_gym
import yaml

HERE = Path(__file__).parent
NUM_ROWS = {"teacher": 1600, "additions": 480}
POOL = 6000
SETTINGS = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 2,
    "allow_parentheses": False,
    "allow_negation": False,
    "operators": ["+"],
}


def main() -> None:
    taken = tested()
    for name, count in NUM_ROWS.items():
        pool = reasoning_gym.create_dataset("basic_arithmetic", size=POOL, seed=1, **SETTINGS)
        rows = []
        for entry in pool:
            if len(rows) < count and entry["question"] not in taken:
                taken.add(entry["question"])
                rows.append({"prompt": f"Question: {entry['question']}\nAnswer:", "completion": f" {entry['answer']}"})
        assert len(rows) == count, f"{name}: {len(rows)} of {count} rows; a larger POOL has more"
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answer(model: str) -> None:
    """The teacher's greedy answers, right or wrong: what sequence-level distillation trains on."""
    from limbeck.generate import eos_ids_of, generate
    from limbeck.models import load_model, load_tokenizer

    tokenizer, teacher = load_tokenizer(model), load_model(model)
    rows = [json.loads(line) for line in (HERE / "additions.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
    eos = eos_ids_of(teacher, tokenizer)
    found = generate(teacher, prompts, 6, eos, tokenizer.pad_token_id or 0, batch_size=48)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    right = sum(text == row["completion"] for text, row in zip(texts, rows, strict=True))
    print(f"{right} of {len(rows)} answers are the right ones")
    answered = [{**row, "completion": text} for row, text in zip(rows, texts, strict=True)]
    (HERE / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered), encoding="utf-8")


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
    answer(sys.argv[1]) if len(sys.argv) > 1 else main()
