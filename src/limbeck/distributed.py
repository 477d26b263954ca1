"""Processes: the only file that calls torch.distributed. Launched by `torchrun`; alone, everything here is the identity.

Under DDP every process holds whole tensors. Under FSDP2 the learner's parameters, their gradients and optimizer state are DTensors, of
which a process holds a part; a tensor says by itself which it is, so that what reads or writes tensors need not be told.

A process that died is noticed by the others at once, as its connections close, and one that hangs after `LIMBECK_TIMEOUT` seconds
without its part of a step. At a barrier they wait longer: a process may be at work alone there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck import stopping
from limbeck.errors import RunError

if TYPE_CHECKING:
    from limbeck.parallel import Parallel

T = TypeVar("T")

TIMEOUT_VARIABLE = "LIMBECK_TIMEOUT"
TIMEOUT = 600.0
"""Seconds. Longer than the longest thing that one process does within a step while others wait: writing a checkpoint."""
PATIENCE = timedelta(days=1)
"""Rank 0 grades alone, and captures end at different times."""

_control: Any = None
"""A group of CPU connections, for what must not make an accelerator wait, and waits for one that is at work alone."""
_prompt: Any = None
"""The same for what all are asked within a step: who does not answer in time hangs."""


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = World()


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
    global _control, _prompt
    started_here = not dist.is_initialized()
    if started_here:
        if cuda:
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_timeout())
    if started_here or _control is None:
        _control = dist.new_group(backend="gloo", timeout=PATIENCE)
        _prompt = dist.new_group(backend="gloo", timeout=_timeout())
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
            _control = _prompt = None


def _timeout() -> timedelta:
    given = os.environ.get(TIMEOUT_VARIABLE) or str(TIMEOUT)
    try:
        return timedelta(seconds=max(float(given), 1.0))
    except (ValueError, OverflowError):
        raise RunError(f"{TIMEOUT_VARIABLE}: found {given!r}, expected seconds") from None


def _is_of_another(error: RuntimeError) -> bool:
    """Whether an error is about a connection to another process; gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


# modules


def opens_on(parallel: Parallel, world: World) -> str:
    """Where models are loaded: on the device that computes, or, where each process is to hold a part only, in main memory."""
    return "cpu" if parallel.is_sharded(world.size) else world.device


def wrap(
    learner: nn.Module, blocks: Sequence[nn.Module], parallel: Parallel, world: World, precision: str, whole: Iterable[nn.Parameter] = ()
) -> nn.Module:
    """The learner as it is to be called. Before the optimizer is made: FSDP2 puts other parameters in the place of the learner's.

    The root unit is the learner itself, so that the student's head, which is used a chunk at a time, is gathered once. `whole` are
    parameters that every process keeps.
    """
    if world.size == 1:
        return learner
    if parallel.strategy == "ddp":
        return nn.parallel.DistributedDataParallel(learner)
    shard(learner, blocks, parallel, world, precision, whole)
    return learner


def shard(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    parallel: Parallel,
    world: World,
    precision: str | None = None,
    whole: Iterable[nn.Parameter] = (),
    keeps_root: bool = True,
) -> None:
    """Divide the parameters of a module among processes, in place, by FSDP2: a unit for each block, one for the rest.

    In `bfloat16` the blocks are gathered, and their gradients computed, in it, over float32 parts whose gradients are added in float32. The
    rest (embeddings, head, projections) stays float32, and autocast does to it what it does under DDP. `keeps_root` leaves the rest whole
    between forward and backward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = torch.device(world.device).type
    over = parallel.shard_over or world.size
    if over == world.size:
        mesh = init_device_mesh(kind, (world.size,))
    else:
        mesh = init_device_mesh(kind, (world.size // over, over), mesh_dim_names=("copies", "parts"))
    reduced = torch.bfloat16 if precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32 if reduced else None, cast_forward_inputs=False)
    ignored = set(whole)
    for parameter in ignored:
        parameter.data = parameter.data.to(world.device)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=parallel.reshard_after_forward, mp_policy=policy, ignored_params=ignored)
    fully_shard(root, mesh=mesh, reshard_after_forward=not keeps_root, ignored_params=ignored)


def calls_through(module: nn.Module, method: str) -> None:
    """Let a method of a sharded module gather its weights as `forward` does; of any other module it is as it was."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(module, method)


def without_sync(wrapped: nn.Module, is_last: bool) -> Any:
    """DDP exchanges gradients only after the last microbatch of an optimizer step. FSDP2 scatters them after each, as what is accumulated
    in between would be as large as all gradients; where there are several copies, these exchange their parts after the last."""
    if (of_copies := getattr(wrapped, "set_requires_all_reduce", None)) is not None:
        of_copies(is_last)
    if is_last or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a norm over all parameters, of which processes may hold parts; returns what it was."""
    trained = list(parameters)
    norm = _whole(nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None]))
    nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return float(norm)


# tensors


def _whole(value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def is_divided(tensors: Iterable[Tensor]) -> bool:
    """Whether processes hold parts of any of these."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(value, DTensor) for value in tensors)


@torch.no_grad()
def gather(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors in rank 0's main memory, one gathered after the other; nothing on the other ranks."""
    found = {}
    for name, value in tensors.items():
        whole = _whole(value.detach())
        if world.is_main:
            found[name] = whole.cpu()
    return found


def write_parts(tensors: Mapping[str, Tensor], files: Mapping[str, int], folder: Path) -> None:
    """Each process writes the parts that it holds as safetensors that say where they belong; what all have, one of them writes. `files` is
    the number of the file, from 1, that a tensor goes into."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), dict(files), save_distributed=True)
    with _causes():
        save(dict(tensors), storage_writer=writer, process_group=_control)


@contextmanager
def _causes() -> Iterator[None]:
    """Where reading or writing failed in a process, all have torch's error, which no `except Exception` sees: the cause instead, or what
    the disks said."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
        if all(isinstance(cause, OSError) for cause in causes.values()):
            raise OSError("; ".join(f"process {rank}: {cause}" for rank, cause in causes.items())) from error
        raise next(iter(causes.values())) from error


def parts_of(world: World) -> str:
    """Names of the files that this process writes by `write_parts`."""
    return f"shard-{world.rank + 1:05d}-*"


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of the tensors in a folder of safetensors, whether these hold parts or wholes."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in found.items()}


def read_into(tensors: Mapping[str, Tensor], folder: Path, world: World) -> None:
    """Fill tensors, whole or divided, from safetensors that hold parts or wholes: those who wrote them may have been more, or fewer."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings(), _causes():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), process_group=_control, no_dist=world.size == 1)


# numbers and words


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


def of_all(value: T, world: World) -> list[T]:
    """What each rank has to say, by rank, however long one of them is at work alone."""
    if world.size == 1:
        return [value]
    told: list[Any] = [None] * world.size
    dist.all_gather_object(told, value, group=_control)
    return told


def any_rank(here: bool, world: World) -> bool:
    """Whether it is so on any rank; all of them get the same answer, in the time that a step may take."""
    if world.size == 1:
        return here
    found = torch.tensor(here, dtype=torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_prompt)
    return bool(found)


def stop_together(world: World) -> None:
    """Raise Stopped on all ranks alike, where any of them was asked to stop."""
    if any_rank(stopping.asked(), world):
        raise stopping.Stopped


def barrier(world: World) -> None:
    """Wait for all ranks, however long one of them is at work alone."""
    if world.size > 1:
        dist.barrier(group=_control)
