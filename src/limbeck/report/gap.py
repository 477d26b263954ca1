"""The share of the way from the SFT student to the teacher that an arm goes, with its interval. No torch; decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from limbeck.errors import RunError
from limbeck.report.crossed import crossed, mean_squares
from limbeck.report.verdict import Run, contributions, scores, shared_items


@dataclass(frozen=True)
class Gap:
    """(arm - SFT) / (teacher - SFT): 0 is the SFT student, 1 the teacher. None, with the reason, where the teacher's lead is not sure."""

    value: float | None
    interval: tuple[float, float] | None
    reason: str = ""


def gap_recovered(arm: Sequence[Run], sft: Sequence[Run], teacher: Run, higher_is_better: bool = True, alpha: float = 0.05) -> Gap:
    """The share of the gap that the arm recovers, over the seeds of arm and SFT and the items of all; the teacher is one fixed model.

    The interval is Fieller's (1954): all shares r for which the mean of (arm - SFT) - r (teacher - SFT) is not told from 0, by the test
    that gives verdicts. It is bounded because the teacher's lead is told from 0, and lopsided as it should be where that lead is only
    just sure; value -+ t * stderr (the delta method) would be neither.
    """
    if not sft or len(arm) != len(sft):
        raise RunError(f"gap recovered: found {len(arm)} runs of the arm against {len(sft)} of SFT; expected one per seed of both")
    if len(sft) < 2:
        return Gap(None, None, "one seed: whether the teacher leads SFT cannot be said across seeds")
    items = shared_items([teacher, *arm, *sft])
    if len(items) < 2:
        raise RunError(f"gap recovered: found {len(items)} items that count in every run and for the teacher; expected at least 2")
    base = scores(sft, items)
    gained = scores(arm, items) - base
    lead = contributions(teacher, items)[None] - base
    whole = crossed(mean_squares(lead), alpha)
    if whole.p > alpha or (whole.value > 0) != higher_is_better:
        low, high = whole.interval
        return Gap(None, None, f"the teacher's lead over SFT is not significant: {whole.value:.4g} [{low:.4g}, {high:.4g}]")

    def is_excluded(share: float) -> bool:
        squares = mean_squares(gained - share * lead)
        return bool(abs(squares.mean) > squares.half_width(alpha))

    share = float(gained.mean()) / whole.value
    return Gap(share, (_edge(is_excluded, share, -1.0), _edge(is_excluded, share, 1.0)))


def _edge(is_excluded: Callable[[float], bool], share: float, direction: float) -> float:
    """The end of the interval on one side of the estimate, by doubling and then halving."""
    outside = 1e-6
    while not is_excluded(share + direction * outside):
        outside *= 2
    inside = 0.0
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if is_excluded(share + direction * middle) else (middle, outside)
    return share + direction * outside
