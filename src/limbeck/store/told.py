"""What a teacher told of itself, where it is not here: k tokens and the mass of the others, as the rows and the head that codecs know.

A codec encodes rows of a live teacher, which its head maps to logits. For a served or an imported teacher a row is what it told, and the
head writes that out over the vocabulary, the mass of the others spread evenly: the k tokens and that mass come out as they went in.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.batch import TopK
from limbeck.objectives.head import Head
from limbeck.objectives.support import SpreadTarget, TopKTarget


class ToldHead(Head):
    """Rows of `told_rows` to log-probabilities. Its weight is empty: it says how many tokens there are, and on which device."""

    @classmethod
    def of(cls, vocabulary: int, device: str = "cpu") -> ToldHead:
        return cls(torch.empty(vocabulary, 0, device=device))

    def __call__(self, rows: Float[Tensor, "n d"], out: Float[Tensor, "n v"] | None = None) -> Float[Tensor, "n v"]:
        k = (rows.shape[1] - 1) // 2
        ids, log_probs, log_tail = rows.split([k, k, 1], dim=1)
        top = TopKTarget(ids.long(), log_probs, {1.0: log_tail[:, 0]})
        return SpreadTarget(top, {1.0: rows.new_zeros(len(self.weight))}).log_probs()


def told_rows(top: TopK) -> Float[Tensor, "n d"]:
    """`[n, 2k + 1]`: ids, log-probabilities, and the log of the mass of the others. float32 holds ids up to 16 million."""
    return torch.cat([top.ids.float(), top.log_probs.float(), top.log_tails[1.0].float()[:, None]], dim=1)
