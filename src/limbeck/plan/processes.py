"""One process of N, as arithmetic: what each holds, and what goes over the wire in a step."""

from __future__ import annotations

from limbeck.parallel import Parallel
from limbeck.plan.memory import Memory

NARROW = {"float32": 1.0, "bfloat16": 0.5}
"""Of a block's weights, what is gathered at a precision; its parts stay float32."""


def each_holds(memory: Memory, processes: int, parallel: Parallel, precision: str = "float32") -> dict[str, int]:
    """Bytes by part in each of N processes.

    DDP holds everything, and the gradients once more in the buckets that it exchanges. FSDP2 holds an N-th of weights, gradients,
    optimizer state and a live teacher, and beside them what is gathered whole: the root (embeddings and head) and two blocks (the next
    comes while one computes), or all blocks where they are not given back between forward and backward; and a buffer of the root's
    gradients, from which they are scattered. Heads of teachers stay whole.
    """
    parts = dict(memory.parts)
    if processes == 1:
        return parts
    if not parallel.is_sharded(processes):
        return {**parts, "buckets": memory.gradients}
    over = parallel.shard_over or processes
    for name in ("weights", "gradients", "optimizer"):
        parts[name] = -(-parts[name] // over)
    if parallel.shard_teacher:
        parts["teacher"] = -(-(parts["teacher"] - memory.teacher_whole) // over) + memory.teacher_whole
    gathered = 2 * memory.largest_block if parallel.reshard_after_forward else memory.weights - memory.root
    scattered = memory.root * memory.gradients // max(memory.weights, 1)
    return {**parts, "gathered": memory.root + int(gathered * NARROW[precision]), "buffer": scattered}


def wire_bytes(memory: Memory, processes: int, parallel: Parallel, microbatches: int, precision: str = "float32") -> float:
    """Bytes that each process sends in a step. A ring sends (N - 1) / N of what is gathered or scattered, twice that for an all-reduce.

    DDP exchanges gradients once a step. FSDP2 does for every microbatch what follows: it gathers the student's blocks for forward and for
    backward, its root once and a live teacher once, and scatters gradients. Copies exchange their parts of these once a step.
    """
    if not parallel.is_sharded(processes):
        return 2 * (processes - 1) / processes * memory.gradients
    over = parallel.shard_over or processes
    copies = processes // over
    blocks = (2 if parallel.reshard_after_forward else 1) * (memory.weights - memory.root) * NARROW[precision]
    taught = memory.teacher - memory.teacher_whole if parallel.shard_teacher else 0
    within = (over - 1) / over * (blocks + memory.root + taught + memory.gradients)
    return microbatches * within + 2 * (copies - 1) / copies * memory.gradients / over
