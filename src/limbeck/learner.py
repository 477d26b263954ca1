"""Learner: the student and whatever the objective trains with it. The only module that is wrapped for DDP or FSDP.

The whole objective runs inside `forward`, so that wrappers, accumulation, projections and the chunked head compose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.batch import Batch, Signal
from limbeck.kernels import CompiledBlock
from limbeck.models import blocks, forward, head
from limbeck.objectives import head as output_head
from limbeck.objectives.base import Calibration, HiddenTerm, LayerPairs, OutputTerm, Term


class Learner(nn.Module):
    """Student, trained projections, and the terms.

    `vocabulary` is the number of real tokens: padded rows of the head get no probability. `chunks` is fixed by the recipe.
    `fused=False` takes the plain reference path, `is_compiled` compiles what the terms do with logits. `seed` draws the projections.
    """

    def __init__(
        self,
        student: Any,
        terms: Mapping[str, Term],
        vocabulary: int,
        teacher_layers: int = 0,
        teacher_width: int = 0,
        chunks: int = 1,
        fused: bool = True,
        seed: int = 0,
        is_compiled: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.vocabulary, self.chunks, self.fused = vocabulary, chunks, fused
        self.output_terms = {key: term for key, term in terms.items() if isinstance(term, OutputTerm)}
        self.hidden_terms = {key: term for key, term in terms.items() if isinstance(term, HiddenTerm)}
        self.compiled = CompiledBlock(self.output_terms) if is_compiled and self.output_terms else None
        num_layers, width = len(blocks(student)), head(student).weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        self.pairs: dict[str, LayerPairs] = {key: term.layer_pairs(num_layers, teacher_layers) for key, term in self.hidden_terms.items()}
        self.projections = nn.ModuleDict(
            {key: term.projections(len(self.pairs[key]), width, teacher_width, generator) for key, term in self.hidden_terms.items()}
        )

    def fit(self, calibration: Calibration) -> None:
        """Give projections the first values that their terms take from the data."""
        for key, term in self.hidden_terms.items():
            term.fit(self.projections[key], self.pairs[key], calibration)  # type: ignore[arg-type]

    def forward(
        self,
        batch: Batch,
        signal: Signal,
        scales: Mapping[str, float],
        terms: Mapping[str, Term] | None = None,
        per_term: bool = False,
    ) -> tuple[Tensor | dict[str, Tensor], dict[str, Tensor]]:
        """The loss, which carries the gradient, and detached unscaled sums per term (and `teacher_nll` where the signal tells it).

        `scales[key]` is weight / count of that term over the whole optimizer step (times the world size under an averaging
        wrapper). `terms` are the learner's as they are at this step, where schedules change them. `per_term` returns one loss per term
        instead of their sum, for measuring how their gradients balance.
        """
        wanted = sorted({student for pairs in self.pairs.values() for student, _ in pairs})
        last, states = forward(self.student, batch.input_ids, batch.position_ids, wanted)
        rows = last.flatten(0, 1)[batch.scored]
        states = {layer: state.flatten(0, 1)[batch.represented] for layer, state in states.items()}
        losses: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        output_terms = {key: term for key, term in (terms or self.output_terms).items() if isinstance(term, OutputTerm)}
        groups = [{key: term} for key, term in output_terms.items()] if per_term else [output_terms]
        for group in groups:
            if not group:
                continue
            loss, group_sums = self._output(rows, batch, signal, group, scales)
            losses["+".join(group)] = loss
            sums.update(group_sums)
        for key, term in self.hidden_terms.items():
            ours = [states[student] for student, _ in self.pairs[key]]
            theirs = [signal.hidden[teacher] for _, teacher in self.pairs[key]]
            total = term.values(ours, theirs, self.projections[key]).sum()  # type: ignore[arg-type]
            losses[key], sums[key] = total * scales[key], total.detach()
        if signal.observed is not None:
            sums["teacher_nll"] = -signal.observed.sum()
        if per_term:
            return losses, sums
        total = sum(losses.values(), last.new_zeros(()))
        if not self.output_terms:
            # The head of no rows: an objective that skips it still gives every parameter a gradient (of zero), for which a wrapper
            # would wait in vain. Elsewhere the head's own gradient is there, and another of its size would cost two passes.
            total = total + head(self.student)(last.flatten(0, 1)[:0]).sum()
        return total, sums

    def _output(
        self, rows: Tensor, batch: Batch, signal: Signal, terms: Mapping[str, OutputTerm], scales: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        cut = head(self.student).cut(self.vocabulary)
        if self.fused:
            compiled = self.compiled if self.compiled and self.compiled.keys == tuple(terms) else None
            return output_head.fused(rows, cut, batch.targets, signal, terms, scales, self.chunks, compiled)
        return output_head.plain(rows, cut, batch.targets, signal, terms, scales)
