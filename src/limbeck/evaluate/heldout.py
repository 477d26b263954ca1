"""Held-out conversations as cases: what `agreement` and `bits_per_byte` share. They are rendered as for training, targets and all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from limbeck.evaluate.base import Benchmark, Item, Subject
from limbeck.evaluate.cases import benchmark_data, choose, in_batches
from limbeck.log import progress, say
from limbeck.tokens.datasets import DataSets, sets_of
from limbeck.tokens.sample import Conversation, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.batch import Batch


class HeldOut(Benchmark):
    """Base of benchmarks over conversations that were not trained on."""

    data: DataSets
    """As in a source of type `dataset`: files, names, mappings. Of a set with `held_out`, the rows that training leaves out."""
    max_length: int = Field(1024, gt=1)
    """Tokens after which a conversation is cut; what was cut is reported."""
    limit: int | None = Field(None, gt=0)
    """Use this many conversations, chosen by the hash of their content and not by their place in the file."""
    batch_size: int = Field(8, gt=0)
    """Conversations per forward."""

    _usable = field_validator("data")(benchmark_data)

    def check(self) -> None:
        self.conversations()

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([row.content for row in self.conversations()]).encode()).hexdigest()

    def conversations(self) -> list[Conversation]:
        """The chosen rows. A row that is there twice counts once: it would tell no more, and pass for more evidence."""
        return choose((row for part in sets_of(self.data) for row in part.read(held_out=True).conversations), _content, self.limit)

    def rendered(self, tokenizer: Any) -> list[Sample]:
        """The chosen conversations as ids and targets, each sample id once."""
        from limbeck.tokens.render import render_all

        samples, report = render_all(self.conversations(), tokenizer, self.max_length)
        if report.num_truncated:
            say(
                f"{self.key}: max_length {self.max_length} cut {report.num_truncated} of {report.num_rows} conversations "
                f"({report.targets_cut} scored tokens); {report.num_dropped} of them have none left and are out"
            )
        return list({sample.sample_id: sample for sample in samples}.values())

    def graded(self, samples: Sequence[Sample], subject: Subject, grade: Callable[[Batch, Tensor], list[Item]]) -> Iterator[Item]:
        """Items of all samples that are not done: `grade` is given each batch and the model's last hidden state `[N, D]` at its scored
        positions."""
        from limbeck.models import forward
        from limbeck.tokens.pad import pad

        pad_id = subject.tokenizer.pad_token_id or 0
        left = [sample for sample in samples if item_id(sample.sample_id) not in subject.done]
        with progress(f"evaluate {self.key}", len(samples), len(samples) - len(left)) as bar:
            for part in in_batches(left, lambda sample: len(sample.ids), self.batch_size):
                batch = pad(part, pad_id).to(subject.device)
                hidden = forward(subject.model, batch.input_ids, batch.position_ids)[0].flatten(0, 1)[batch.scored]
                yield from grade(batch, hidden)
                bar.advance(len(part))


def item_id(sample_id: int) -> str:
    """A sample id as an item's: 16 hex digits."""
    return f"{sample_id & (2**64 - 1):016x}"


def _content(row: Conversation) -> str:
    parts = [row.messages, row.tools, row.prompt, row.completion, *([] if row.text is None else [row.text])]
    return json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
