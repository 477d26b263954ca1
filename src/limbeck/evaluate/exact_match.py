"""Exact match: the model answers procedurally generated questions (reasoning-gym) greedily, and the answer is right or wrong.

Answers are compared by us and not by reasoning-gym's `score_answer`, which for several tasks runs `eval` on what the model wrote.
So a task wants one right answer, as arithmetic has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from importlib import metadata
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from limbeck.errors import LimbeckError, RecipeError, nearest
from limbeck.evaluate.base import Benchmark, Item, Subject
from limbeck.evaluate.prompt import PromptStyle, answer_texts, prompt_ids, prompt_text
from limbeck.log import progress

POOL = 2000
"""Questions that are looked through for distinct ones; fixed, because some tasks' questions depend on the size of the data set."""
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|(?<![\w.])-?\.\d+")


class ExactMatch(Benchmark):
    """Questions of a reasoning-gym task. `accuracy`: the answer is right. `answered`: there is one, and it ended within the budget."""

    type: Literal["exact_match"] = "exact_match"
    task: str
    """Name of a reasoning-gym task."""
    settings: dict[str, Any] = {}
    """The task's own settings, such as the number of digits: they decide how hard it is."""
    seed: int = Field(0, ge=0)
    """Which questions. Most tasks make question i from seed + i: stay thousands away from the seeds of training data."""
    limit: int = Field(100, gt=0, le=1000)
    """Number of questions, all different."""
    suffix: str = ""
    """Appended to every question, to say how to answer."""
    prompt: PromptStyle = "chat"
    """`chat` asks as a user's turn of the tokenizer's chat template, `plain` as "Question: ... Answer:"; for base models."""
    extract: Literal["line", "number"] = "line"
    """What of the model's text is its answer: the last line that is not empty, without punctuation around it, or the last number."""
    max_new_tokens: int = Field(64, gt=0)
    """Tokens after which an answer is cut."""
    batch_size: int = Field(16, gt=0)
    """Questions answered at once."""

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[dict[str, bool]] = {"accuracy": True, "answered": True}
    ceilings: ClassVar[dict[str, float]] = {"accuracy": 1.0, "answered": 1.0}

    @field_validator("settings")
    @classmethod
    def _not_ours(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted({"seed", "size"} & set(settings)):
            ours = {"seed": "seed", "size": "limit"}[taken[0]]
            raise ValueError(f"{taken[0]!r} is no setting of a task here; expected it as `{ours}` of the benchmark")
        return settings

    def check(self) -> None:
        self.entries()

    def fingerprint(self) -> str:
        return f"reasoning-gym {metadata.version('reasoning-gym')}"

    def run(self, subject: Subject) -> Iterator[Item]:
        tokenizer, everything = subject.tokenizer, self.entries()
        entries = [(index, entry) for index, entry in everything.items() if self._item_id(index) not in subject.done]
        texts = [prompt_text(tokenizer, entry["question"] + self.suffix, self.prompt, self.key) for _, entry in entries]
        prompts = [prompt_ids(tokenizer, text, self.prompt) for text in texts]
        with progress(f"evaluate {self.key}", len(everything), len(everything) - len(entries)) as bar:
            for answers in answer_texts(subject, prompts, self.max_new_tokens, self.batch_size):
                for number, (text, ended) in answers.items():
                    yield self._grade(*entries[number], text, ended)
                bar.advance(len(answers))

    def _item_id(self, index: int) -> str:
        return f"{self.task}-{self.seed}-{index}"

    def _grade(self, index: int, entry: dict[str, Any], text: str, ended: bool) -> Item:
        found = extract(text, self.extract)
        return Item(
            id=self._item_id(index),
            sums={"accuracy": float(is_same(found, entry["answer"])), "answered": float(ended and found != "")},
            counts={"accuracy": 1.0, "answered": 1.0},
            detail={"question": entry["question"], "text": text, "extracted": found, "expected": entry["answer"]},
        )

    def entries(self) -> dict[int, dict[str, Any]]:
        """The first `limit` questions that differ, by their index in the task's data set."""
        dataset = self._dataset()
        chosen: dict[str, int] = {}
        entries: dict[int, dict[str, Any]] = {}
        for index in range(POOL):
            entry = dataset[index]
            if not self._can_be_right(entry["answer"]):
                raise RecipeError(
                    f"evaluate: {self.key!r}: task {self.task!r} has the answer {entry['answer']!r:.60}, which extract {self.extract!r} "
                    "never gives; choose another task, or another way to extract"
                )
            if chosen.setdefault(entry["question"], index) == index:
                entries[index] = entry
            if len(entries) == self.limit:
                return entries
        raise RecipeError(
            f"evaluate: {self.key!r}: task {self.task!r} gives {len(entries)} different questions in {POOL} with these settings, "
            f"limit is {self.limit}; lower it, or widen the settings"
        )

    def _can_be_right(self, answer: Any) -> bool:
        """Whether an answer could ever match; some tasks want several lines, or have no written answer at all."""
        return isinstance(answer, str) and extract(answer, self.extract) != "" and is_same(extract(answer, self.extract), answer)

    def _dataset(self) -> Any:
        try:
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError as error:
            raise LimbeckError(
                f"evaluate: {self.key!r} needs the package reasoning-gym; install it with: pip install 'limbeck[demo]'"
            ) from error
        where = f"evaluate: {self.key!r}: "
        if self.task not in DATASETS:
            hint = nearest(self.task, DATASETS) or f"; known tasks: {', '.join(sorted(DATASETS))}"
            raise RecipeError(f"{where}task {self.task!r} is none of reasoning-gym's{hint}")
        known = [field.name for field in fields(DATASETS[self.task][1]) if field.name not in ("seed", "size")]
        if unknown := sorted(set(self.settings) - set(known)):
            hint = nearest(unknown[0], known) or f"; known settings: {', '.join(known)}"
            raise RecipeError(f"{where}settings.{unknown[0]}: unknown setting of task {self.task!r}{hint}")
        try:
            dataset = create_dataset(self.task, seed=self.seed, size=POOL, **self.settings)
            dataset[0]
        except Exception as error:  # tasks check their settings by assertions, or not at all
            raise RecipeError(f"{where}task {self.task!r} refuses the settings {self.settings}: {error or type(error).__name__}") from error
        return dataset


def extract(text: str, how: Literal["line", "number"]) -> str:
    """The answer in a model's text; empty where there is none."""
    if how == "number":
        numbers = NUMBER.findall(text.replace("−", "-"))
        return numbers[-1].rstrip(",") if numbers else ""
    lines: Sequence[str] = [line for line in (_bare(line) for line in text.splitlines()) if line]
    return lines[-1] if lines else ""


def is_same(found: str, expected: str) -> bool:
    """Equal as numbers, or as texts without regard to case, white space and punctuation around them."""
    if normalise(found) == normalise(expected):
        return True
    numbers = _number(found), _number(expected)
    return None not in numbers and numbers[0] == numbers[1]


def normalise(text: str) -> str:
    return " ".join(_bare(text).casefold().split())


def _bare(line: str) -> str:
    return line.strip().strip("*_`$\"'“”‘’ \t").rstrip(".,;:!? \t").strip("*_`$\"'“”‘’ \t")


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(_bare(text).replace(",", ""))
    except InvalidOperation:
        return None
