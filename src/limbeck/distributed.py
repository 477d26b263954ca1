"""Processes: the only file that calls torch.distributed. Launched by `torchrun`; alone, everything here is the identity."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


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
    started_here = not dist.is_initialized()
    if started_here:
        if cuda:
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if started_here:
            dist.destroy_process_group()


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


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()
