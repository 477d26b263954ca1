"""Multiple choice in three ways: the likelihood of each answer's text behind the question, that of its letter, or a letter that is written.

Small models answer with letters at chance, whatever they know (they prefer one letter); the likelihood of the answers' own text
shows what they know. Larger ones know more when they see the choices, as one who asks them shows them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from limbeck.cache import files_hash, resolve_data
from limbeck.errors import DataError, nearest
from limbeck.evaluate.base import Benchmark, Item, Metric, Subject, ratio
from limbeck.evaluate.cases import choose, in_batches
from limbeck.evaluate.likelihood import log_probs, shares_cache
from limbeck.evaluate.prompt import PromptStyle, answer_ids, answer_texts, prompt_ids, prompt_text
from limbeck.log import progress

LETTERS = string.ascii_uppercase
INSTRUCTION = "Answer with the letter of the right choice only."
SAID = re.compile(r"(?i:answer|choice|option)(?i:\s+is)?\s*:?\s*[(*\"'`]*([A-Z])(?![\w'’])")
"""A letter behind "answer is", "Answer:", "option" and the like."""
BEGUN = re.compile(r"[\s(\[*\"'`]*([A-Z])(?:[\s\])*\"'`]*(?:$|[.:,)\]*\n]))")
"""A letter that the text begins with, and that is no word of a sentence, as `A dog` begins with one."""
METRICS = {"cloze": ("acc_norm", "acc"), "letter": ("acc",), "generate": ("acc", "answered")}
KEYS = ("id", "question", "choices", "answer", "passage")


@dataclass(frozen=True)
class Case:
    """One question. `answer` is the index of the right choice."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    where: str


@dataclass(frozen=True)
class Tokens:
    """A case as ids: the prompt once, and each choice behind it."""

    case: Case
    prompt: list[int]
    choices: list[list[int]]

    @property
    def cost(self) -> int:
        """Tokens that the model reads for it, padding of its own choices included."""
        return len(self.prompt) + len(self.choices) * max(map(len, self.choices))


class MultipleChoice(Benchmark):
    """Rows of `question`, `choices`, `answer` (index of the right one), `id` and, where there is one, `passage`.

    `acc`: the choice is right, by log-probability, or as written. `acc_norm`, for `cloze`: by log-probability per byte, so that length
    does not decide. `answered`, for `generate`: the answer has the letter of a choice.
    """

    type: Literal["multiple_choice"] = "multiple_choice"
    data: str
    """File, or data set in Limbeck's cache, as JSON lines."""
    method: Literal["cloze", "letter", "generate"] = "cloze"
    """`cloze` compares the likelihoods of the choices' texts behind the question, `letter` those of their letters behind a question that
    lists them, `generate` takes the letter from a greedy answer to it."""
    limit: int | None = Field(None, gt=0)
    """Use this many questions, chosen by the hash of their ids and not by their place in the file."""
    batch_size: int = Field(8, gt=0)
    """Questions per forward, each with all its choices."""
    prompt: PromptStyle = "chat"
    """`chat` asks as a user's turn of the tokenizer's chat template, `plain` as "Question: ... Answer:"; for base models."""
    max_new_tokens: int = Field(16, gt=0)
    """Tokens after which an answer is cut, for `generate`."""

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[dict[str, bool]] = {"acc_norm": True, "acc": True, "answered": True}
    ceilings: ClassVar[dict[str, float]] = {"acc_norm": 1.0, "acc": 1.0, "answered": 1.0}

    def check(self) -> None:
        for case in read_cases(self.data):
            if self.method != "cloze" and len(case.choices) > len(LETTERS):
                raise DataError(
                    f"{case.where}: choices: found {len(case.choices)}, expected at most {len(LETTERS)}, a letter for each; "
                    "set `method: cloze`"
                )

    def fingerprint(self) -> str:
        return files_hash([self.data])

    def run(self, subject: Subject) -> Iterator[Item]:
        cases = choose(read_cases(self.data), lambda case: case.id, self.limit)
        left = [case for case in cases if case.id not in subject.done]
        grade = self._written if self.method == "generate" else self._likeliest
        with progress(f"evaluate {self.key}", len(cases), len(cases) - len(left)) as bar:
            for part in grade(left, subject):
                yield from part
                bar.advance(len(part))

    def metrics(self, items: Sequence[Item]) -> dict[str, Metric]:
        chance = sum(1 / item.detail["num_choices"] for item in items) / len(items) if items else None
        chances = {"acc": chance, "acc_norm": chance}
        return {name: ratio(items, name, True, chances.get(name), self.ceilings[name]) for name in METRICS[self.method]}

    def _likeliest(self, cases: Sequence[Case], subject: Subject) -> Iterator[list[Item]]:
        """Items of a batch after the other, by the likelihoods of the choices' texts or letters."""
        from limbeck.generate import refuse_longer

        tokens = [self._tokens(case, subject.tokenizer) for case in cases]
        for each in tokens:
            refuse_longer(subject.model, len(each.prompt) + max(map(len, each.choices)), each.case.where)
        shared = shares_cache(subject.model)
        for part in in_batches(tokens, lambda each: each.cost, self.batch_size):
            scores = log_probs(subject, [each.prompt for each in part], [each.choices for each in part], shared)
            yield [_grade(each.case, score, METRICS[self.method]) for each, score in zip(part, scores, strict=True)]

    def _written(self, cases: Sequence[Case], subject: Subject) -> Iterator[list[Item]]:
        """Items of a batch after the other, by the letters in greedy answers."""
        texts = [prompt_text(subject.tokenizer, self._question(case), self.prompt, self.key) for case in cases]
        prompts = [prompt_ids(subject.tokenizer, text, self.prompt) for text in texts]
        for answers in answer_texts(subject, prompts, self.max_new_tokens, self.batch_size):
            yield [_grade_text(cases[index], text) for index, (text, _) in answers.items()]

    def _question(self, case: Case) -> str:
        """The question as it is asked; for letters with its choices."""
        if self.method == "cloze":
            return case.question
        listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, case.choices, strict=False)]
        return "\n".join([case.question, *listed, *([INSTRUCTION] if self.prompt == "chat" else [])])

    def _tokens(self, case: Case, tokenizer: Any) -> Tokens:
        text = prompt_text(tokenizer, self._question(case), self.prompt, self.key)
        answers = case.choices if self.method == "cloze" else LETTERS[: len(case.choices)]
        return Tokens(
            case,
            prompt_ids(tokenizer, text, self.prompt),
            [answer_ids(tokenizer, text, answer, self.prompt) for answer in answers],
        )


def _grade(case: Case, scores: Sequence[float], metrics: Sequence[str] = METRICS["cloze"]) -> Item:
    """By likelihood: the best score chooses, and for `acc_norm` the best per byte of the choice's text."""
    per_byte = [score / len(choice.encode("utf-8")) for score, choice in zip(scores, case.choices, strict=True)]
    chosen = {"acc_norm": per_byte.index(max(per_byte)), "acc": scores.index(max(scores))}
    detail = {
        "chosen": chosen[metrics[0]],
        "expected": case.answer,
        "num_choices": len(case.choices),
        "log_probs": [round(score, 4) for score in scores],
    }
    if "acc_norm" in metrics:
        detail["chosen_unnormalised"] = chosen["acc"]
    return Item(case.id, {name: float(chosen[name] == case.answer) for name in metrics}, dict.fromkeys(metrics, 1.0), detail)


def _grade_text(case: Case, text: str) -> Item:
    """By what was written: no letter is a wrong answer."""
    found = extract_letter(text, len(case.choices))
    chosen = LETTERS.index(found) if found else None
    return Item(
        case.id,
        {"acc": float(chosen == case.answer), "answered": float(chosen is not None)},
        {"acc": 1.0, "answered": 1.0},
        {"text": text, "chosen": chosen, "expected": case.answer, "num_choices": len(case.choices)},
    )


def extract_letter(text: str, num_choices: int) -> str:
    """The letter of a choice that the text gives as its answer; empty where there is none, or another than those of the choices.

    The last that is called the answer, else the one that the text begins with. A letter in the midst of a sentence is none: "A" is a word.
    """
    said, begun = SAID.findall(text), BEGUN.match(text)
    found = str(said[-1]) if said else begun.group(1) if begun else ""
    return found if found in LETTERS[:num_choices] else ""


def read_cases(name: str) -> list[Case]:
    """The questions of a JSON-lines file, each row checked."""
    from limbeck.tokens.files import rows_of

    path = resolve_data(name)
    cases: dict[str, Case] = {}
    for where, row in rows_of(path):
        case = _case(row, where)
        if case.id in cases:
            raise DataError(f"{where}: id {case.id!r} is that of {cases[case.id].where} too, expected ids that differ")
        cases[case.id] = case
    if not cases:
        raise DataError(f"{path}: found no rows, expected one JSON object per line with {', '.join(KEYS[:-1])}")
    return list(cases.values())


def _case(row: Any, where: str) -> Case:
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {row!r:.60}, expected an object with {', '.join(KEYS[:-1])}")
    for key in KEYS[:-1]:
        if row.get(key) is None:
            near = next((hint for found in row if found not in KEYS and (hint := nearest(found, [key]))), "")
            raise DataError(f"{where}: `{key}` is missing, found keys {', '.join(map(repr, row))}{near}")
    identity, question, passage, choices = row["id"], row["question"], row.get("passage") or "", row["choices"]
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        raise DataError(f"{where}: id: found {identity!r:.60}, expected a text or number")
    for key, text in (("question", question), ("passage", passage)):
        if not isinstance(text, str) or (key == "question" and not text.strip()):
            raise DataError(f"{where}: {key}: found {text!r:.60}, expected a text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) and each.strip() for each in choices):
        raise DataError(f"{where}: choices: found {choices!r:.60}, expected a list of at least two texts, none empty")
    answer = row["answer"]
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer: found {answer!r:.60}, expected the index of the right choice, 0 to {len(choices) - 1}")
    text = f"{passage.strip()}\n\n{question.strip()}" if passage.strip() else question.strip()
    return Case(str(identity), text, tuple(each.strip() for each in choices), answer, where)
