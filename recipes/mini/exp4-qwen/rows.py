"""Makes this study's data from BFCL's: prompts with one tool and a short schema, of which no tool of `bfcl/heldout` is any.

    limbeck assets fetch bfcl/train bfcl/heldout bfcl/irrelevance
    python recipes/mini/exp4-qwen/rows.py runs/exp4-qwen

`train.jsonl` is what students learn from, `train_json.jsonl` the same with calls as JSON, a line each, and `teacher.jsonl` these rows
and others, on which the teacher of exp4-smollm2 is tuned. `in_domain.jsonl` asks for the same tools in other words,
`out_of_domain.jsonl` for tools that are in none of them, and in `irrelevance.jsonl` the tool on offer is of no use.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from limbeck.assets import catalog

Row = dict[str, Any]

NUM_TOOLS = 32
LONGEST = 900
"""Characters of a question with its tool's schema."""


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    by_tool: defaultdict[str, list[Row]] = defaultdict(list)
    for row in short("bfcl/train"):
        by_tool[row["tools"][0]["function"]["name"]].append(row)
    groups = [group for group in by_tool.values() if len(group) > 1][:NUM_TOOLS]
    # a tool's first row, or its second: those with several calls come after those with one
    train = [group[i % 2] for i, group in enumerate(groups)]
    others = ([row for row in group if row["messages"][0] != ours["messages"][0]] for group, ours in zip(groups, train, strict=True))
    in_domain = [group[0] for group in others if group]
    write(folder / "train.jsonl", train)
    write(folder / "train_json.jsonl", map(as_json, train))
    write(folder / "in_domain.jsonl", in_domain)
    asked = [row["messages"][0] for row in in_domain]
    write(folder / "teacher.jsonl", [row for group in by_tool.values() for row in group if row["messages"][0] not in asked])
    write(folder / "out_of_domain.jsonl", short("bfcl/heldout"))
    write(folder / "irrelevance.jsonl", short("bfcl/irrelevance"))


def short(name: str) -> Iterator[Row]:
    (asset,) = catalog.select([name])
    with open(asset.path, encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            length = len(json.dumps(row["tools"])) + sum(len(message["content"]) for message in row["messages"])
            if len(row["tools"]) == 1 and length <= LONGEST:
                yield row


def as_json(row: Row) -> Row:
    """Calls as text, without the template's `<tool_call>`, which the Qwen models of 0.5B and 1.5B have never learned to write."""
    question, answer = row["messages"]
    calls = [json.dumps(call["function"]) for call in answer["tool_calls"]]
    return row | {"messages": [question, {"role": "assistant", "content": "\n".join(calls)}]}


def write(path: Path, rows: Iterable[Row]) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
