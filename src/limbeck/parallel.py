"""How the processes of a run share its work: the recipe's section. What it asks of torch is done in `distributed.py`. Torch-free."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from limbeck.errors import RecipeError
from limbeck.spec import Spec

Strategy = Literal["single", "ddp", "fsdp2"]


class Parallel(Spec):
    """How several processes, started by `torchrun`, share a run. It changes speed and memory, and not the result; one process alone does as
    if it were not there."""

    strategy: Strategy = "ddp"
    """`ddp`: each process holds everything, and gradients are exchanged. `fsdp2`: each holds its part of the student's weights, gradients
    and optimizer state and of a live teacher's weights, and gathers a block when it computes it. `single` refuses several processes."""
    shard_over: int | None = Field(None, gt=1)
    """Of `fsdp2`: so many processes hold one copy together, and copies exchange gradients only, once a step. The number in a machine keeps
    the gathering off the network; all of them where it is not set, which takes the least memory."""
    reshard_after_forward: bool = True
    """Of `fsdp2`: give a block back after its forward and gather it again for its backward. Without it there is a third less to send, and
    the student's weights are whole in memory during a step."""
    shard_teacher: bool = True
    """Of `fsdp2`: share a live teacher's blocks as well. Without it every process holds the teacher whole, and nothing of it is sent."""

    def check(self, processes: int, teacher: Any = None) -> None:
        """Refuse a number of processes that this section does not fit, and, where weights are divided, a teacher loaded in few bits."""
        if self.strategy == "single" and processes > 1:
            raise RecipeError(f"parallel.strategy: found 'single' with {processes} processes, expected one process, or ddp or fsdp2")
        if self.is_sharded(processes) and self.shard_over is not None and processes % self.shard_over:
            raise RecipeError(f"parallel.shard_over: found {self.shard_over}, expected a number that divides the {processes} processes")
        load_in = getattr(teacher, "load_in", None)
        if self.is_sharded(processes) and load_in is not None:
            raise RecipeError(
                f"teacher.load_in: found {load_in!r} with parallel.strategy 'fsdp2', which divides weights in float32 and bfloat16 only; "
                "expected teacher.dtype bfloat16, or parallel.strategy ddp"
            )

    def is_sharded(self, processes: int) -> bool:
        """Whether weights are divided among so many processes."""
        return self.strategy == "fsdp2" and processes > 1
