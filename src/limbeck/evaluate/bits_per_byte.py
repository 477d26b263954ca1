"""Bits per byte: how well a model predicts held-out text, whatever its tokenizer.

Per byte and not per token: a vocabulary of longer tokens has fewer of them, each harder to predict, so that losses per token compare
only within one tokenizer. The bytes of a text are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from limbeck.evaluate.base import Item, Subject
from limbeck.evaluate.heldout import HeldOut, item_id
from limbeck.tokens.identity import vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.batch import Batch


class BitsPerByte(HeldOut):
    """-log2 p of the scored tokens over the UTF-8 bytes that they stand for.

    Only tokens that carry bytes of text are scored: an end of turn is no text, and has other names and lengths in other tokenizers.
    """

    type: Literal["bits_per_byte"] = "bits_per_byte"

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[dict[str, bool]] = {"bits_per_byte": False}

    def run(self, subject: Subject) -> Iterator[Item]:
        import torch

        from limbeck.models import head
        from limbeck.teachers.model import observed_log_probs

        num_bytes = torch.tensor(bytes_per_token(subject.tokenizer), dtype=torch.float64)
        student_head = head(subject.model).cut(len(num_bytes))

        def grade(batch: Batch, hidden: Tensor) -> list[Item]:
            sizes = num_bytes[batch.targets.cpu()]
            text = (sizes > 0).to(batch.targets.device)
            bits = -observed_log_probs(student_head, hidden[text], batch.targets[text]).double().cpu() / math.log(2)
            row = (batch.scored // batch.input_ids.shape[1]).cpu()
            ids = batch.sample_ids[:, 0].tolist()
            total_bits = torch.bincount(row[text.cpu()], bits, minlength=len(ids)).tolist()
            total_bytes = torch.bincount(row, sizes, minlength=len(ids)).tolist()
            return [
                Item(item_id(sample_id), {"bits_per_byte": total_bits[i]}, {"bits_per_byte": total_bytes[i]})
                for i, sample_id in enumerate(ids)
            ]

        yield from self.graded(self.rendered(subject.tokenizer), subject, grade)


def bytes_per_token(tokenizer: Any) -> list[int]:
    """UTF-8 bytes of text that each id stands for; 0 for special tokens and for ids that are no token."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    return [0 if piece is None or index in special else len(piece) for index, piece in enumerate(vocabulary(tokenizer))]
