"""Conversations to samples: token ids and target masks, of at most `max_length` tokens. What the model writes is a target, everything else
is context.

Three steps, of which only the first needs the tokenizer, and is kept on disk (rendered.py): ids and mask of the whole row, then cutting
to length, then the count of what was lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from limbeck.errors import DataError
from limbeck.tokens.chat import encode, render_chat
from limbeck.tokens.sample import Conversation, Rendered, Sample, make_sample

TooLong = Literal["cut", "split", "drop"]


@dataclass(frozen=True)
class RenderReport:
    """What became of a data set."""

    num_rows: int
    num_samples: int
    """Rows, or pieces of rows, that are trained on."""
    num_duplicates: int
    """Samples whose ids an earlier sample has too; they are kept."""
    num_tokens: int
    num_scored: int
    share_scored: float
    """Scored tokens as a share of the tokens."""
    num_truncated: int
    """Rows that were cut to `max_length`, those among them that are out."""
    num_dropped: int
    """Rows without a target, or of which truncation left none; they are out."""
    tokens_cut: int
    """Tokens that truncation took, with all of the dropped rows."""
    targets_cut: int
    num_split: int = 0
    """Rows longer than `max_length` that are trained on in pieces."""
    num_too_long: int = 0
    """Rows left out as longer than `max_length`."""
    num_too_short: int = 0
    """Rows left out as shorter than `min_length`."""
    formats: dict[str, int] = field(default_factory=dict)
    """Rows by the format in which they were written."""


@dataclass(frozen=True)
class Limits:
    """How long a sample may be, and what becomes of a row that is longer."""

    max_length: int
    min_length: int = 0
    too_long: TooLong | None = None

    def policy(self, conversation: Conversation) -> TooLong:
        """A cut conversation has lost its end; the middle of one has lost what it answers. Of a plain text every part is worth as much."""
        return self.too_long or ("split" if conversation.text is not None else "cut")


def render(conversation: Conversation, tokenizer: Any, max_length: int) -> Sample:
    """One conversation as ids and target mask, cut to `max_length` tokens."""
    rendered = render_whole(conversation, tokenizer)
    return make_sample(rendered.ids, rendered.is_target, max_length)


def render_all(
    conversations: Iterable[Conversation], tokenizer: Any, max_length: int, min_length: int = 0, too_long: TooLong | None = None
) -> tuple[list[Sample], RenderReport]:
    """The samples of a data set, in order, and what truncation took from it; DataError where nothing is left to learn."""
    ((samples,), report) = render_sets([list(conversations)], tokenizer, Limits(max_length, min_length, too_long))
    return samples, report


def render_sets(sets: Sequence[Sequence[Conversation]], tokenizer: Any, limits: Limits) -> tuple[list[list[Sample]], RenderReport]:
    """The samples of several data sets, each in its order, and one report on all of them."""
    from limbeck.tokens.rendered import render_rows

    samples: list[list[Sample]] = []
    counts: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    longest = 0
    for conversations in sets:
        samples.append([])
        for conversation, row in zip(conversations, render_rows(conversations, tokenizer), strict=True):
            longest = max(longest, len(row.ids))
            formats[conversation.format] += 1
            samples[-1] += _samples(row, limits, limits.policy(conversation), tokenizer, counts)
    everything = [sample for part in samples for sample in part]
    num_rows = sum(map(len, sets))
    if not everything:
        found = f"; the longest has {longest} tokens" if num_rows else ""
        raise DataError(f"no token to learn in any of {num_rows} rows at max_length {limits.max_length}, expected at least one{found}")
    num_tokens, num_scored = sum(len(sample.ids) for sample in everything), sum(sample.num_scored for sample in everything)
    return samples, RenderReport(
        num_rows=num_rows,
        num_samples=len(everything),
        num_duplicates=len(everything) - len({sample.sample_id for sample in everything}),
        num_tokens=num_tokens,
        num_scored=num_scored,
        share_scored=num_scored / num_tokens,
        formats={name: count for name, count in formats.items() if name},
        **{key: counts[key] for key in _COUNTED},
    )


_COUNTED = ("num_truncated", "num_dropped", "tokens_cut", "targets_cut", "num_split", "num_too_long", "num_too_short")


def _samples(row: Rendered, limits: Limits, policy: TooLong, tokenizer: Any, counts: Counter[str]) -> list[Sample]:
    """What is trained on of a row; whatever is not goes into `counts`."""
    length, targets = len(row.ids), int(row.is_target[1:].sum())
    if length < limits.min_length:
        counts["num_too_short"] += 1
        return []
    if length > limits.max_length and policy == "drop":
        counts["num_too_long"] += 1
        return []
    if length > limits.max_length and policy == "split":
        counts["num_split"] += 1
        samples = _pieces(row, limits.max_length, start_ids(tokenizer))
    else:
        counts["num_truncated"] += int(length > limits.max_length)
        samples = [make_sample(row.ids, row.is_target, limits.max_length)]
        counts["targets_cut"] += targets - samples[0].num_scored
        counts["tokens_cut"] += length - len(samples[0].ids)
    kept = [sample for sample in samples if sample.num_scored]
    if not kept:
        counts["num_dropped"] += 1
    counts["tokens_cut"] += sum(len(sample.ids) for sample in samples if not sample.num_scored)
    return kept


def _pieces(row: Rendered, max_length: int, start: Sequence[int]) -> list[Sample]:
    """A row as samples of up to `max_length` tokens, each target in one of them.

    A piece opens with one token of context, as it would alone: what the tokenizer puts before a text, or else the last token of the piece
    before it.
    """
    length, prefix = len(row.ids), len(start)
    has_start = 0 < prefix < max_length and row.ids[:prefix].tolist() == list(start)
    stride = max_length - (prefix if has_start else 1)
    pieces = []
    for first in range(prefix if has_start else 0, length - (not has_start), stride):
        if has_start:
            ids = [*start, *row.ids[first : first + stride].tolist()]
            is_target = [*row.is_target[:prefix].tolist(), *row.is_target[first : first + stride].tolist()]
        else:
            ids = row.ids[first : first + max_length].tolist()
            is_target = row.is_target[first : first + max_length].tolist()
        pieces.append(make_sample(ids, is_target, max_length))
    return pieces


def render_whole(conversation: Conversation, tokenizer: Any) -> Rendered:
    """All ids of a conversation, and which of them are targets."""
    if conversation.messages:
        ids, is_target = render_chat(conversation, tokenizer)
    elif conversation.text is not None:
        ids, is_target = _render_text(conversation, tokenizer)
    else:
        ids, is_target = _render_completion(conversation, tokenizer)
    return Rendered.of(ids, is_target)


def _render_text(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Every token of a plain text is a target except the first, which nothing precedes; its end is one too."""
    ids = _ended(_started(encode(tokenizer, str(conversation.text)), tokenizer), conversation, tokenizer)
    first = max(len(start_ids(tokenizer)), 1)
    return ids, [position >= first for position in range(len(ids))]


def _render_completion(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Prompt and completion are tokenised apart, as they are when a model answers; whatever the tokenizer puts before a text stays."""
    if conversation.prompt is None or conversation.completion is None:
        raise DataError(f"{conversation.where}: found no messages, expected `messages`, `prompt` and `completion`, or `text`")
    prompt = _started(encode(tokenizer, conversation.prompt), tokenizer)
    completion = _ended(encode(tokenizer, conversation.completion), conversation, tokenizer)
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def _started(ids: list[int], tokenizer: Any) -> list[int]:
    start = start_ids(tokenizer)
    return ids if ids[: len(start)] == start else start + ids


def _ended(ids: list[int], conversation: Conversation, tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise DataError(f"{conversation.where}: the tokenizer has no eos token, expected one to end the text with")
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def start_ids(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text; those it puts after one (eos) would stand between prompt and completion."""
    bare = encode(tokenizer, "a")
    full = list(tokenizer("a")["input_ids"])
    starts = (start for start in range(len(full)) if full[start : start + len(bare)] == bare)
    return full[: next(starts, 0)]
