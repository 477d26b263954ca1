"""Multiple choice by cloze likelihood: the model chooses the answer that it finds most likely behind the question.

Small models answer with letters at chance, whatever they know (they prefer one letter); the likelihood of the answers' own text
shows what they know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from limbeck.cache import resolve_data
from limbeck.errors import DataError, nearest
from limbeck.evaluate.base import Benchmark, Item, Metric, Subject, ratio
from limbeck.evaluate.cases import choose, files_hash, in_batches
from limbeck.evaluate.prompt import PromptStyle, answer_ids, prompt_ids, prompt_text
from limbeck.log import progress

if TYPE_CHECKING:
    from torch import Tensor

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

    `acc_norm` chooses by log-probability per byte, so that length does not decide; `acc` by log-probability.
    """

    type: Literal["multiple_choice"] = "multiple_choice"
    data: str
    """File, or data set in Limbeck's cache, as JSON lines."""
    limit: int | None = Field(None, gt=0)
    """Use this many questions, chosen by the hash of their ids and not by their place in the file."""
    batch_size: int = Field(8, gt=0)
    """Questions per forward, each with all its choices."""
    prompt: PromptStyle = "chat"
    """`chat` asks as a user's turn of the tokenizer's chat template, `plain` as "Question: ... Answer:"; for base models."""

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[dict[str, bool]] = {"acc_norm": True, "acc": True}

    def check(self) -> None:
        read_cases(self.data)

    def fingerprint(self) -> str:
        return files_hash([self.data])

    def run(self, subject: Subject) -> list[Item]:
        from limbeck.generate import refuse_longer

        cases = choose(read_cases(self.data), lambda case: case.id, self.limit)
        tokens = [self._tokens(case, subject.tokenizer) for case in cases]
        for each in tokens:
            refuse_longer(subject.model, len(each.prompt) + max(map(len, each.choices)), each.case.where)
        items = []
        with progress(f"evaluate {self.key}", len(tokens)) as bar:
            for part in in_batches(tokens, lambda each: each.cost, self.batch_size):
                scores = log_probs(subject, [each.prompt for each in part], [each.choices for each in part])
                items += [_grade(each.case, score) for each, score in zip(part, scores, strict=True)]
                bar.advance(len(part))
        return items

    def metrics(self, items: Sequence[Item]) -> dict[str, Metric]:
        chance = sum(1 / item.detail["num_choices"] for item in items) / len(items) if items else None
        return {name: ratio(items, name, better, chance) for name, better in self.higher_is_better.items()}

    def _tokens(self, case: Case, tokenizer: Any) -> Tokens:
        text = prompt_text(tokenizer, case.question, self.prompt, self.key)
        return Tokens(
            case,
            prompt_ids(tokenizer, text, self.prompt),
            [answer_ids(tokenizer, text, choice, self.prompt) for choice in case.choices],
        )


def _grade(case: Case, scores: Sequence[float]) -> Item:
    per_byte = [score / len(choice.encode("utf-8")) for score, choice in zip(scores, case.choices, strict=True)]
    chosen = {"acc_norm": per_byte.index(max(per_byte)), "acc": scores.index(max(scores))}
    return Item(
        id=case.id,
        sums={name: float(index == case.answer) for name, index in chosen.items()},
        counts=dict.fromkeys(chosen, 1.0),
        detail={
            "chosen": chosen["acc_norm"],
            "chosen_unnormalised": chosen["acc"],
            "expected": case.answer,
            "num_choices": len(case.choices),
            "log_probs": [round(score, 4) for score in scores],
        },
    )


def log_probs(subject: Subject, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
    """log p(choice | prompt) of every choice of every prompt, in nats.

    A prompt is read once for all its choices, which go on from its KV cache; only the choices' tokens meet the head.
    """
    import torch

    from limbeck.generate import pad_left
    from limbeck.models import backbone, head
    from limbeck.teachers.model import observed_log_probs
    from limbeck.tokens.identity import vocabulary

    decoder, pad_id, device = backbone(subject.model), subject.tokenizer.pad_token_id or 0, subject.device
    ids, mask = pad_left(prompts, pad_id, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    read = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    owner = torch.tensor([index for index, each in enumerate(choices) for _ in each], device=device)
    answers = [answer for each in choices for answer in each]
    targets, real = _pad_right(answers, device)
    rows = read.last_hidden_state[owner, -1:]
    if targets.shape[1] > 1:
        read.past_key_values.batch_select_indices(owner)
        steps = torch.arange(targets.shape[1] - 1, device=device)
        seen = torch.cat([mask[owner], torch.ones_like(targets[:, 1:])], dim=1)
        more = decoder(
            input_ids=targets[:, :-1],
            attention_mask=seen,
            position_ids=positions[owner, -1:] + 1 + steps,
            past_key_values=read.past_key_values,
            use_cache=True,
        )
        rows = torch.cat([rows, more.last_hidden_state], dim=1)
    cut = head(subject.model).cut(len(vocabulary(subject.tokenizer)))
    scores = torch.zeros(targets.shape, dtype=torch.float64)
    scores[real.cpu()] = observed_log_probs(cut, rows[real], targets[real]).double().cpu()
    totals = iter(scores.sum(-1).tolist())
    return [[next(totals) for _ in each] for each in choices]


def _pad_right(answers: Sequence[Sequence[int]], device: str) -> tuple[Tensor, Tensor]:
    """Ids `[M, W]` and which of them are real. Causal attention hides padding that comes last."""
    import torch

    width = max(map(len, answers))
    ids = torch.zeros(len(answers), width, dtype=torch.long)
    real = torch.zeros(len(answers), width, dtype=torch.bool)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(answer)
        real[row, : len(answer)] = True
    return ids.to(device), real.to(device)


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
