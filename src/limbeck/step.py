"""One optimizer step. Count, then scale, then sum: the tokens of all microbatches are counted over all processes, so that every term's
scale is known before the first forward, and the result depends neither on accumulation, nor on ranks, nor on padding or packing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from limbeck import distributed
from limbeck.batch import Batch, Signal
from limbeck.distributed import World
from limbeck.errors import RunError
from limbeck.objectives.base import Term, gates
from limbeck.training import Train


@dataclass
class StepResult:
    """What an optimizer step did: values over all processes."""

    loss: float
    sums: dict[str, float]
    counts: dict[str, float]
    grad_norm: float
    teacher_seconds: float


class NotFiniteError(RunError):
    """A step whose loss or gradient is infinite or no number: on all ranks alike, and nothing was changed by it."""

    def __init__(self, message: str, result: StepResult) -> None:
        super().__init__(message)
        self.result = result


def optimizer_step(
    wrapped: nn.Module,
    terms: Mapping[str, Term],
    batches: Sequence[Batch],
    score: Callable[[Batch], Signal],
    optimizer: torch.optim.Optimizer,
    spec: Train,
    world: World,
) -> StepResult:
    """One update from this rank's microbatches. `terms` are as they are at this step, with numbers in the place of schedules. Raises
    NotFiniteError, and Stopped between microbatches, with weights and optimizer untouched."""
    totals: Counter[str] = Counter({"scored": 0, "represented": 0})
    for batch in batches:
        totals.update(batch.counts)
    counts = distributed.sum_over_ranks(totals, world)
    # DDP and FSDP2 average gradients over ranks; the factor makes it a sum
    scales = {key: term.weight / max(counts[term.count], 1) * world.size for key, term in terms.items()}
    running = {key: torch.zeros((), device=world.device) for key in (*terms, *gates(terms), "teacher_nll")}
    teacher_seconds = 0.0
    optimizer.zero_grad(set_to_none=True)
    for i, batch in enumerate(batches):
        distributed.stop_together(world)
        batch = batch.to(world.device)
        start = time.perf_counter()
        signal = score(batch)
        teacher_seconds += time.perf_counter() - start
        autocast = torch.autocast(torch.device(world.device).type, torch.bfloat16, enabled=spec.precision == "bfloat16")
        with distributed.without_sync(wrapped, i == len(batches) - 1):
            with autocast:
                loss, batch_sums = wrapped(batch, signal, scales, terms)
            loss.backward()
        for key, value in batch_sums.items():
            running[key] += value
    # read once per step: a read per microbatch would make an accelerator wait for each
    sums = distributed.sum_over_ranks(dict(zip(running, torch.stack(list(running.values())).tolist(), strict=True)), world)
    trainable = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    grad_norm = distributed.clip_gradients(trainable, spec.optimizer.max_grad_norm or math.inf)
    total = sum(term.weight * sums[key] / max(counts[term.count], 1) for key, term in terms.items())
    result = StepResult(total, sums, counts, grad_norm, teacher_seconds)
    if not math.isfinite(grad_norm) or not math.isfinite(total):
        terms_ = "".join(f", {key} {sums[key]}" for key in terms if not math.isfinite(sums[key]))
        raise NotFiniteError(f"loss {total}, gradient norm {grad_norm}{terms_}: not finite, so the weights were not touched", result)
    optimizer.step()
    return result
