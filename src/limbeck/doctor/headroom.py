"""Is there anything to learn from this teacher? Both models read a few of the recipe's rows; the sentence says what to expect, and why.

It compares the teacher with the student as it starts. A student that fine-tuning alone would bring as far has headroom too: whether
distilling beats fine-tuning, a study measures.
"""

from __future__ import annotations

import math
from typing import Any

from limbeck import adapters
from limbeck.doctor.finding import Finding, Level
from limbeck.evaluate import Subject
from limbeck.evaluate.agreement import Agreement
from limbeck.evaluate.base import Item, ratio
from limbeck.recipe import Recipe
from limbeck.sources.dataset import DatasetSource
from limbeck.student import Student

SAMPLE = 32
"""Conversations that are read."""
ALIKE = 0.01
"""KL(teacher || student), nats per token, under which the two are one model to a loss."""
CONFIDENCE = 1.96
"""Standard errors of a 95 % interval."""


def headroom(recipe: Recipe, student: Student, tokenizer: Any) -> Finding:
    """Loads both models. On rows that training leaves out where the data set has `held_out`, else on rows that it uses."""
    import torch

    from limbeck.student import build

    source = recipe.source
    assert isinstance(source, DatasetSource)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = [part.model_copy(update={"weight": None}) for part in source.sets]
    sample = Agreement(type="agreement", data=data, limit=SAMPLE, max_length=source.max_length)
    model = build(student, device, recipe.seed).eval()
    with torch.no_grad():
        items = list(sample.run(Subject(model, tokenizer, device, recipe.teacher)))
    is_base = adapters.base_of(model) is not None and all(item.sums["kl"] == 0 for item in items)
    return judge(items, is_base)


def judge(items: list[Item], is_own_base: bool = False) -> Finding:
    """The figures, nats per token, and what they let expect."""
    metrics = {name: ratio(items, name, False) for name in ("nll", "teacher_nll", "kl", "top1")}
    ours, theirs, kl, top1 = (metrics[name].value or 0.0 for name in metrics)
    apart = [Item(item.id, {"gap": item.sums["nll"] - item.sums["teacher_nll"]}, {"gap": item.counts["nll"]}) for item in items]
    gap = ratio(apart, "gap", True)
    lead, error = gap.value or 0.0, CONFIDENCE * (math.inf if gap.stderr is None else gap.stderr)
    figures = f"NLL per token: student {ours:.3f}, teacher {theirs:.3f}; KL {kl:.3f}, same first token {top1:.1%}"
    by = f"{abs(lead):.3f} ± {error:.3f} nats per token"
    level: Level
    if is_own_base:
        level, expect = (
            "warning",
            "not to help, because the student starts as its teacher: the term holds it there, and teaches nothing new",
        )
    elif kl < ALIKE:
        level, expect = "stop", f"not to help, because student and teacher say the same (KL {kl:.4f} is under {ALIKE})"
    elif lead - error > 0:
        level, expect = "ok", f"to help, because the teacher predicts this data better by {by}, and the student differs from it"
    elif lead + error < 0:
        level, expect = "stop", f"not to help, because the teacher predicts this data worse than the student already does, by {by}"
    else:
        level, expect = (
            "warning",
            f"nothing yet, because {len(items)} rows cannot tell the two apart: the teacher's lead is {lead:.3f} ± {error:.3f}",
        )
    detail = {
        **{name: metric.value for name, metric in metrics.items()},
        "lead": lead,
        "lead_95": None if math.isinf(error) else error,
        "rows": len(items),
    }
    return Finding("headroom", level, f"expect distillation {expect}. {figures}", detail)
