"""Function calling: the model is offered tools and asked for something, and the calls that it writes are compared with those admissible.

Calls are compared as syntax and never made. How they are read is in calls.py, when they are right in call_match.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from limbeck.errors import DataError, nearest
from limbeck.evaluate.base import Benchmark, Item, Metric, Subject, ratio
from limbeck.evaluate.call_match import OMITTED, Expected, mismatch, right_arguments
from limbeck.evaluate.calls import parse
from limbeck.evaluate.cases import benchmark_data, choose
from limbeck.evaluate.prompt import answer_texts
from limbeck.evaluate.tool_prompt import Asker, ToolStyle, asker
from limbeck.log import progress
from limbeck.tokens.datasets import DataSets, sets_of
from limbeck.tokens.messages import kind
from limbeck.tokens.sample import Conversation

MAX_SHOWN = 2000
"""Characters of a model's text that an item keeps."""


@dataclass(frozen=True)
class Case:
    """One prompt. `expected` are the calls that are right, none where no tool can serve; `schemas` the parameters of each tool."""

    id: str
    category: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    expected: tuple[Expected, ...]
    where: str

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        functions = [tool.get("function", tool) for tool in self.tools]
        return {function["name"]: function.get("parameters") or {} for function in functions}


class FunctionCalling(Benchmark):
    """Rows of `messages` and `tools` with the right calls: `possible_answer` as BFCL has it, `calls`, or those of the last message.

    `accuracy`: the calls are right, by BFCL's AST match; where none is expected, there is none. `accuracy/CATEGORY`: in one category.
    `format`: nothing but calls was written, in the style that was asked for; `parsed`: a call could be read. `hallucinated_tools`: share of
    the calls that name no tool on offer. `arguments`: share of right arguments where the right function is called. `irrelevance`: no
    call where none is expected.
    """

    type: Literal["function_calling"] = "function_calling"
    data: DataSets
    """As in a source of type `dataset`: files, names, mappings. Of a set with `held_out`, the rows that training leaves out."""
    categories: list[str] | None = None
    """Use only rows of these categories, by their column `category`."""
    limit: int | None = Field(None, gt=0)
    """Use this many rows, chosen by the hash of their ids and not by their place in the file."""
    prompt: ToolStyle = "auto"
    """`template` shows the tools by the tokenizer's chat template, `stated` in words that also say how to write a call; `auto` is
    `template` where the template has a place for tools."""
    max_new_tokens: int = Field(256, gt=0)
    """Tokens after which an answer is cut."""
    batch_size: int = Field(8, gt=0)
    """Prompts answered at once."""

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[dict[str, bool]] = {
        "accuracy": True,
        "format": True,
        "parsed": True,
        "hallucinated_tools": False,
        "arguments": True,
        "irrelevance": True,
    }

    _usable = field_validator("data")(benchmark_data)

    @field_validator("data")
    @classmethod
    def _as_asked(cls, data: DataSets) -> DataSets:
        if any(part.tools != "template" for part in sets_of(data)):
            raise ValueError("found `tools`, which is for training; here tools are put in words by `prompt: stated`")
        return data

    @field_validator("categories")
    @classmethod
    def _some(cls, categories: list[str] | None) -> list[str] | None:
        if categories is not None and not categories:
            raise ValueError("found none, expected at least one")
        return categories

    def check(self) -> None:
        self.cases()

    def fingerprint(self) -> str:
        told = [
            [case.id, case.category, case.messages, case.tools, [[each.name, each.arguments] for each in case.expected]]
            for case in self.cases()
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def cases(self) -> list[Case]:
        """The chosen rows, each checked."""
        found: dict[str, Case] = {}
        for part in sets_of(self.data):
            for row, conversation in part.with_rows(held_out=True):
                case = _case(row, conversation)
                if case.id in found:
                    raise DataError(f"{case.where}: id {case.id!r} is that of {found[case.id].where} too, expected ids that differ")
                found[case.id] = case
        known = sorted({case.category for case in found.values()} - {""})
        for name in self.categories or ():
            if name not in known:
                hint = nearest(name, known) or f"; known categories: {', '.join(known) or 'none'}"
                raise DataError(f"evaluate: {self.key!r}: categories: found {name!r}, which no row has{hint}")
        rows = (case for case in found.values() if self.categories is None or case.category in self.categories)
        chosen = choose(rows, lambda case: case.id, self.limit)
        if not chosen:
            raise DataError(f"evaluate: {self.key!r}: found no rows, expected `messages`, `tools` and the right calls")
        return chosen

    def run(self, subject: Subject) -> Iterator[Item]:
        from limbeck.generate import refuse_longer

        everything = self.cases()
        cases = [case for case in everything if case.id not in subject.done]
        ask = asker(subject.tokenizer, self.prompt, f"evaluate: {self.key!r}")
        prompts = [ask.ids(case.messages, case.tools, case.where) for case in cases]
        for case, prompt in zip(cases, prompts, strict=True):
            refuse_longer(
                subject.model, len(prompt) + self.max_new_tokens, f"{case.where}: a prompt with max_new_tokens {self.max_new_tokens}"
            )
        with progress(f"evaluate {self.key}", len(everything), len(everything) - len(cases)) as bar:
            # special tokens stay: several templates open calls with one
            for answers in answer_texts(subject, prompts, self.max_new_tokens, self.batch_size, keep_special=True):
                for index, (text, ended) in answers.items():
                    yield grade(cases[index], text, ended, ask)
                bar.advance(len(answers))

    def metrics(self, items: Sequence[Item]) -> dict[str, Metric]:
        """A model that calls nothing is right where nothing is expected: that is the chance of `accuracy`."""
        silent = sum("irrelevance" in item.counts for item in items) / len(items) if items else None
        found = {"accuracy": ratio(items, "accuracy", True, silent, 1.0)}
        categories = sorted({name for item in items for name in item.counts if name.startswith("accuracy/")})
        if len(categories) > 1:
            for name in categories:
                ours = [item for item in items if name in item.counts]
                found[name] = ratio(items, name, True, sum("irrelevance" in item.counts for item in ours) / len(ours), 1.0)
        return found | {
            name: ratio(items, name, better, ceiling=float(better)) for name, better in self.higher_is_better.items() if name != "accuracy"
        }


def grade(case: Case, text: str, ended: bool, ask: Asker) -> Item:
    """What a model wrote, against what was expected. `ended` says that it came to an end within its budget."""
    parsed, schemas = parse(text), case.schemas
    calls = parsed.calls
    if not case.expected:
        reason = f"called {calls[0].name!r:.80}, expected no call" if calls else ""
    elif not calls:
        reason = "no call could be read" if ended else "no call could be read, and the text was cut by max_new_tokens"
    else:
        reason = mismatch(calls, case.expected, schemas)
    right = float(not reason)
    scores = {"accuracy": (right, 1.0), "hallucinated_tools": (float(sum(call.name not in schemas for call in calls)), float(len(calls)))}
    if case.category:
        scores[f"accuracy/{case.category}"] = (right, 1.0)
    if case.expected:
        scores["format"] = (float(ended and parsed.exact and parsed.style == ask.style), 1.0)
        scores["parsed"] = (float(bool(calls)), 1.0)
        right_ones, total = right_arguments(calls, case.expected, schemas)
        scores["arguments"] = (float(right_ones), float(total))
    else:
        scores["irrelevance"] = (right, 1.0)
    return Item(
        id=case.id,
        sums={name: score for name, (score, _) in scores.items()},
        counts={name: count for name, (_, count) in scores.items()},
        detail={
            "text": text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "...",
            "expected": [{each.name: each.arguments} for each in case.expected],
            "reason": reason,
            "tools_by": ask.how,
            "style": parsed.style,
            "style_asked_for": ask.style,
        },
    )


# --- rows


def _case(row: dict[str, Any], conversation: Conversation) -> Case:
    where, messages = conversation.where, conversation.messages
    if row.get("tools") is None:  # an empty list is an offer too
        raise DataError(f"{where}: `tools` is missing, expected the schemas of the functions on offer")
    answer = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    expected = _expected(row, answer, where)
    asked = messages[:-1] if answer is not None else messages
    if not asked:
        raise DataError(f"{where}: messages: found none before the assistant's, expected what the model is asked")
    category = row.get("category") or ""
    if not isinstance(category, str):
        raise DataError(f"{where}: category: found {kind(category)}, expected a text")
    identity = row.get("id")
    if identity is None:
        identity = hashlib.sha256(conversation.content.encode()).hexdigest()[:16]
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        raise DataError(f"{where}: id: found {kind(identity)}, expected a text or number")
    case = Case(str(identity), category, asked, conversation.tools, expected, where)
    for each in expected:
        if each.name not in case.schemas:
            raise DataError(f"{where}: {each.name!r} is expected, and none of the tools{nearest(each.name, case.schemas)}")
    return case


def _expected(row: dict[str, Any], answer: dict[str, Any] | None, where: str) -> tuple[Expected, ...]:
    """The right calls of a row, from the first of its columns that says them."""
    if row.get("possible_answer") is not None:
        return tuple(_admissible(each, f"{where}: possible_answer.{i}") for i, each in enumerate(_list(row, "possible_answer", where)))
    if row.get("calls") is not None:
        return tuple(_exact(each, f"{where}: calls.{i}") for i, each in enumerate(_list(row, "calls", where)))
    if answer is not None:
        return tuple(_exact(each, where) for each in answer.get("tool_calls") or ())
    raise DataError(
        f"{where}: found no right calls, expected `possible_answer`, `calls` (an empty list for none), or a last message with them"
    )


def _list(row: dict[str, Any], key: str, where: str) -> list[Any]:
    if not isinstance(row[key], list):
        raise DataError(f"{where}: {key}: found {kind(row[key])}, expected a list of calls, an empty one where none is right")
    return list(row[key])


def _admissible(value: Any, where: str) -> Expected:
    """A call as BFCL writes it: `{function: {argument: [admissible values]}}`."""
    if not isinstance(value, dict) or len(value) != 1:
        raise DataError(f"{where}: found {kind(value)}, expected an object of one function's name and its arguments")
    ((name, arguments),) = value.items()
    if not isinstance(arguments, dict):
        raise DataError(f"{where}.{name}: found {kind(arguments)}, expected an object of arguments")
    for argument, choices in arguments.items():
        if not isinstance(choices, list):
            hint = f"; {json.dumps(OMITTED)} says that it may be left out"
            raise DataError(f"{where}.{name}.{argument}: found {kind(choices)}, expected a list of admissible values{hint}")
    return Expected(name, arguments)


def _exact(value: Any, where: str) -> Expected:
    """A call with the one value that each argument may have."""
    call = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
        raise DataError(f"{where}: found {kind(value)}, expected an object with `name` and `arguments`")
    return Expected(call["name"], {name: [_one_choice(item)] for name, item in call["arguments"].items()})


def _one_choice(value: Any) -> Any:
    """A value as an admissible one: inside of it, each key of an object has a list of them."""
    if isinstance(value, dict):
        return {key: [_one_choice(item)] for key, item in value.items()}
    return [_one_choice(item) for item in value] if isinstance(value, list) else value
