"""Processes: the only file that calls torch.distributed. Launched by `torchrun`; alone, everything here is the identity.

A process that died is noticed by the others at once, as its connections close, and one that hangs after `LIMBECK_TIMEOUT` seconds
without its part of a step. At a barrier they wait longer: a process may be at work alone there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from limbeck import stopping
from limbeck.errors import RunError

TIMEOUT_VARIABLE = "LIMBECK_TIMEOUT"
TIMEOUT = 600.0
"""Seconds. Longer than the longest thing that one process does within a step while others wait: writing a checkpoint."""
PATIENCE = timedelta(days=1)
"""Rank 0 grades alone, and captures end at different times."""

_control: Any = None
"""A group of CPU connections, for what must not make an accelerator wait."""


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that torchrun started, and leave them at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local_rank}" if cuda else "cpu"
    if size == 1 and not dist.is_initialized():
        yield World(device=device)
        return
    global _control
    started_here = not dist.is_initialized()
    if started_here:
        if cuda:
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_timeout())
    if started_here or _control is None:
        _control = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    except RuntimeError as error:
        if not _is_of_another(error):
            raise
        stopping.check()  # it was asked to stop too, and was quicker
        raise RunError(
            f"another process of this run has died, or did not answer for {_timeout().total_seconds():g} seconds ({TIMEOUT_VARIABLE} "
            f"sets that); its own messages say why. Start the same command again to go on. ({' '.join(str(error).split())[:200]})"
        ) from error
    finally:
        if started_here:
            dist.destroy_process_group()
            _control = None


def _timeout() -> timedelta:
    given = os.environ.get(TIMEOUT_VARIABLE) or str(TIMEOUT)
    try:
        return timedelta(seconds=max(float(given), 1.0))
    except (ValueError, OverflowError):
        raise RunError(f"{TIMEOUT_VARIABLE}: found {given!r}, expected seconds") from None


def _is_of_another(error: RuntimeError) -> bool:
    """Whether an error is about a connection to another process; gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def wrap(learner: nn.Module, world: World) -> nn.Module:
    """The learner as it is to be called: DDP where there is more than one process."""
    if world.size == 1:
        return learner
    return nn.parallel.DistributedDataParallel(learner)


def without_sync(wrapped: nn.Module, is_last: bool) -> Any:
    """Gradients are exchanged only after the last microbatch of an optimizer step."""
    if is_last or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


def sum_over_ranks(values: Mapping[str, float], world: World) -> dict[str, float]:
    """Element-wise sum of a mapping with the same keys on every rank."""
    if world.size == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def from_main(pairs: list[list[int]], world: World) -> list[list[int]]:
    """Rank 0's numbers on every rank, where each has as many: what was computed from floats may differ by a bit on other hardware."""
    if world.size == 1:
        return pairs
    shared = torch.tensor(pairs, device=world.device)
    dist.broadcast(shared, src=0)
    return shared.tolist()  # type: ignore[no-any-return]


def any_rank(here: bool, world: World) -> bool:
    """Whether it is so on any rank; all of them get the same answer."""
    if world.size == 1:
        return here
    found = torch.tensor(here, dtype=torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_control)
    return bool(found)


def stop_together(world: World) -> None:
    """Raise Stopped on all ranks alike, where any of them was asked to stop."""
    if any_rank(stopping.asked(), world):
        raise stopping.Stopped


def barrier(world: World) -> None:
    """Wait for all ranks, however long one of them is at work alone."""
    if world.size > 1:
        dist.barrier(group=_control)
