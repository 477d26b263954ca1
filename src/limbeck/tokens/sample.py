"""Conversation and Sample: one training example before and after the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Conversation:
    """One row of a data set: `messages` (with optional `tools`), a `prompt` and its `completion`, or a plain `text`.

    Nothing is learned from the first `num_context` messages. `where` names the row in errors, `format` is what it was read from.
    """

    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    num_context: int = 0
    where: str = "conversation"
    format: str = ""

    @property
    def content(self) -> str:
        """All that its rendering depends on, keys in their order: templates write them in it."""
        parts = [self.messages, self.tools, self.prompt, self.completion, self.text, self.num_context]
        return json.dumps(parts, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Rendered:
    """A whole row in tokens, before anything is cut."""

    ids: np.ndarray
    is_target: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[int], is_target: Sequence[bool]) -> Rendered:
        return cls(np.asarray(ids, dtype=np.int64), np.asarray(is_target, dtype=bool))


@dataclass(frozen=True)
class Sample:
    """Rendered token ids. `is_target[i]` says that token i is to be learned (so position i-1 is scored).

    `sample_id` hashes the ids before truncation: another `max_length`, order or batch size finds the same capture. `num_total` is
    the number of tokens before truncation and `num_targets_total` of targets.
    """

    sample_id: int
    ids: np.ndarray = field(repr=False)
    is_target: np.ndarray = field(repr=False)
    num_total: int = 0
    num_targets_total: int = 0

    @property
    def num_scored(self) -> int:
        """Targets that have a predecessor: the first token of a document is never predicted."""
        return int(self.is_target[1:].sum())


def sample_id_of(ids: Sequence[int] | np.ndarray) -> int:
    """A signed 64-bit id from the SHA-256 of the ids; the same on every machine."""
    digest = hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def make_sample(ids: Sequence[int] | np.ndarray, is_target: Sequence[bool] | np.ndarray, max_length: int) -> Sample:
    """A Sample cut to `max_length` tokens that remembers how long it was."""
    mask = np.asarray(is_target, dtype=bool)
    mask = mask.copy()
    mask[:1] = False
    return Sample(
        sample_id=sample_id_of(ids),
        ids=np.asarray(ids[:max_length], dtype=np.int64),
        is_target=mask[:max_length],
        num_total=len(ids),
        num_targets_total=int(mask.sum()),
    )
