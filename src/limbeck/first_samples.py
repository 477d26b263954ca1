"""First samples: states of student and teacher at the same tokens before training, for hidden terms that begin with what these say.

Nothing runs until a term asks. The samples are the first of the run's order, so they depend on its seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from limbeck import distributed
from limbeck.distributed import World
from limbeck.models import blocks, forward
from limbeck.objectives.base import Calibration, HiddenTerm, States, Term
from limbeck.sources.base import OpenSource
from limbeck.teachers import Scorer
from limbeck.tokens.pad import pad
from limbeck.tokens.sample import Sample

MAX_SAMPLES, MAX_TOKENS = 64, 4096
"""What is looked at: more would cost minutes on a large model, and change little."""


class FirstSamples(Calibration):
    """States `[r, width]` in float32 at up to MAX_TOKENS tokens."""

    def __init__(self, student: Any, scorer: Scorer | None, source: OpenSource, device: str) -> None:
        self._student, self._scorer, self._source, self._device = student, scorer, source, device

    @property
    def student(self) -> States:
        return self._states[0]

    @property
    def teacher(self) -> States:
        return self._states[1]

    @cached_property
    def _states(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        assert self._scorer is not None, "a hidden term has a teacher"
        ours: dict[int, list[Tensor]] = {}
        theirs: dict[int, list[Tensor]] = {}
        with torch.no_grad():
            for sample in samples_of(self._source):
                batch = pad([sample], 0).to(self._device)
                _, states = forward(self._student, batch.input_ids, batch.position_ids, range(len(blocks(self._student))))
                for layer, state in states.items():
                    ours.setdefault(layer, []).append(state.flatten(0, 1)[batch.represented].float())
                for layer, state in self._scorer.score(batch).hidden.items():
                    theirs.setdefault(layer, []).append(state.float())
        joined = [{layer: torch.cat(parts)[:MAX_TOKENS] for layer, parts in states.items()} for states in (ours, theirs)]
        return joined[0], joined[1]


def samples_of(source: OpenSource) -> list[Sample]:
    """The first samples of the run's order, each once, up to some number of tokens."""
    unique = {sample.sample_id: sample for sample in source.at(0, MAX_SAMPLES)}
    chosen: list[Sample] = []
    for sample in unique.values():
        if sum(len(each.ids) for each in chosen) < MAX_TOKENS:
            chosen.append(sample)
    return chosen


def settle(
    terms: Mapping[str, Term], calibration: Calibration, known: Mapping[str, Any], world: World
) -> tuple[dict[str, Term], dict[str, Any]]:
    """The terms with their layer maps decided, and these maps with what decided them. `known` are those that the run began with."""
    settled, maps = dict(terms), dict[str, Any]()
    for key, term in terms.items():
        if isinstance(term, HiddenTerm) and not term.is_settled:
            maps[key] = known.get(key) or term.map_layers(calibration.student, calibration.teacher)
            maps[key]["pairs"] = distributed.from_main(maps[key]["pairs"], world)
            settled[key] = term.mapped(tuple((student, teacher) for student, teacher in maps[key]["pairs"]))
    return settled, maps
