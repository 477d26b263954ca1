"""Batch and Signal: what flows through a training step, and the shape legend of the package.

Shift and mask happen once, where a Batch is made; from here on output losses are flat over scored tokens and hidden losses over
represented ones. No loss shifts, masks or reduces.

Shape letters: B rows of a batch, T time, N scored tokens, R represented tokens, n a chunk of either, V vocabulary, S support,
D student width, E teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

TeacherHead = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Tokens of one microbatch.

    `scored` are flat positions (row * T + column) whose *next* token is a target, `targets` those next tokens; `represented` are the flat
    positions at which hidden states are compared (all real tokens). `sample_ids` and `offsets` say for every token which sample it
    comes from and where in that sample it stands: a capture is looked up by them. Padding has document id -1.
    """

    input_ids: Int[Tensor, "b t"]
    position_ids: Int[Tensor, "b t"]
    document_ids: Int[Tensor, "b t"]
    sample_ids: Int[Tensor, "b t"]
    offsets: Int[Tensor, "b t"]
    scored: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]
    represented: Int[Tensor, " r"]

    @property
    def counts(self) -> dict[str, int]:
        """Tokens of each kind that a term may be counted over."""
        return {"scored": self.scored.numel(), "represented": self.represented.numel()}

    @property
    def num_tokens(self) -> int:
        """Real (unpadded) tokens."""
        return self.represented.numel()

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class TopK:
    """The teacher's most probable tokens at scored positions, at temperature 1, and what is left.

    `log_tails[T]` is the log of the mass outside of the k ids at temperature T; 1 is there, and other temperatures are refused. A row
    with fewer than k tokens is padded with an id of its own and log-probability -inf. With `log_priors[T]`, unnormalised and the same for
    all rows, the tail is spread over the tokens outside of the k in proportion to the prior: the teacher is then dense.
    """

    ids: Int[Tensor, "n k"]
    log_probs: Float[Tensor, "n k"]
    log_tails: Mapping[float, Float[Tensor, " n"]]
    log_priors: Mapping[float, Float[Tensor, " v"]] | None = None

    def __getitem__(self, rows: slice) -> TopK:
        tails = {temperature: tail[rows] for temperature, tail in self.log_tails.items()}
        return TopK(self.ids[rows], self.log_probs[rows], tails, self.log_priors)


@dataclass(frozen=True)
class Draws:
    """An unbiased estimate of the teacher's distribution at temperature 1: tokens drawn from it and what each stands for.

    The expectation of `weights`, scattered to `ids`, is the distribution; a row's need not sum to 1, and an id with weight 0 is padding.
    `neg_entropy` is sum p log p of the distribution itself, of which the draws know nothing, in nats.
    """

    ids: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]
    neg_entropy: Float[Tensor, " n"]

    def __getitem__(self, rows: slice) -> Draws:
        return Draws(self.ids[rows], self.weights[rows], self.neg_entropy[rows])


@dataclass(frozen=True)
class Signal:
    """What the teacher says about a Batch.

    `output` with `teacher_head` is the dense support: the head maps rows of `output` to logits over the shared vocabulary, so
    logits exist only for a chunk at a time; it returns a new tensor, which its caller may overwrite. `sparse` is what a capture
    keeps of a few tokens instead. `hidden[l]` is the residual stream after block `l` (counted from 0, before the final norm).
    `observed` is the teacher's own log-probability of each target, for the log.
    """

    output: Float[Tensor, "n e"] | None = None
    teacher_head: TeacherHead | None = None
    sparse: TopK | Draws | None = None
    hidden: Mapping[int, Float[Tensor, "r e"]] = field(default_factory=dict)
    observed: Float[Tensor, " n"] | None = None

    def to(self, device: torch.device | str) -> Signal:
        return cast(Signal, _moved(self, device))


def _moved(value: Any, device: torch.device | str) -> Any:
    """All tensors in a Signal, moved."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: _moved(getattr(value, item.name), device) for item in fields(value)})
    return value
