"""One process of N, as arithmetic: what each holds, and what goes over the wire in a step."""

from __future__ import annotations

from typing import Literal

from limbeck.plan.memory import Memory

Strategy = Literal["ddp", "fsdp2"]


def each_holds(memory: Memory, processes: int, strategy: Strategy) -> dict[str, int]:
    """Bytes by part in each of N processes.

    DDP holds everything, and the gradients once more in the buckets that it exchanges. FSDP2 holds an N-th of weights, gradients,
    optimizer state and teacher, and beside them what is gathered whole: the root (embeddings and head), two blocks (the next comes while
    one computes) and the teacher's head.
    """
    parts = dict(memory.parts)
    if processes == 1:
        return parts
    if strategy == "ddp":
        return {**parts, "buckets": memory.gradients}
    for name in ("weights", "gradients", "optimizer"):
        parts[name] = -(-parts[name] // processes)
    parts["teacher"] = -(-(parts["teacher"] - memory.teacher_head) // processes) + memory.teacher_head
    return {**parts, "gathered": memory.root + 2 * memory.largest_block}


def wire_bytes(memory: Memory, processes: int, strategy: Strategy, microbatches: int) -> float:
    """Bytes that each process sends in a step. A ring sends (N - 1) / N of what is gathered or scattered, twice that for an all-reduce.

    DDP exchanges gradients once a step; FSDP2 gathers weights in forward and backward of every microbatch, and scatters gradients once.
    """
    share = (processes - 1) / processes
    if strategy == "ddp":
        return 2 * share * memory.gradients
    return share * (2 * microbatches * memory.weights + memory.gradients)
