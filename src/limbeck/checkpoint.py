"""Checkpoints: a folder that is there whole or not at all, verified by checksums before it is used. Safetensors and JSON only.

    checkpoints/step-00000024/  learner.safetensors  optimizer.safetensors  state.json  manifest.json

Under FSDP2 each process writes what it holds by torch.distributed.checkpoint, into files that say which part it is (`shard-RANK-model-...`,
of weights and of optimizer state). Both are read by the same code into whatever layout the run has now. All processes see one folder.

The learning rate, the data order and the random numbers are pure functions of (seed, step), so weights, optimizer state and the
step number are all that a bit-exact resume needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck import distributed
from limbeck.distributed import ALONE, World
from limbeck.errors import RunError
from limbeck.run import fsync_dir

MANIFEST = "manifest.json"
WEIGHTS, OPTIMIZER, STATE = "learner.safetensors", "optimizer.safetensors", "state.json"
_TEMPORARY = ".tmp"


def save(
    root: Path,
    step: int,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    keep: int,
    world: World = ALONE,
) -> Path:
    """Write the checkpoint of `step` finished steps and delete all but the newest `keep` (at least one). Every process calls it; where one
    cannot write, all raise. Without an optimizer it holds weights alone."""
    final = root / name_of(step)
    temporary = root / f"{final.name}{_TEMPORARY}"
    files: dict[str, Any] = {}

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write() -> None:
        _write(temporary, weights(learner), None if optimizer is None else _optimizer_state(learner, optimizer), world)
        files.update({file.name: _describe(file) for file in temporary.glob(distributed.parts_of(world))})

    def publish() -> None:
        (temporary / STATE).write_text(json.dumps({**state, "step": step}), encoding="utf-8")
        files.update({file.name: _describe(file) for file in sorted(temporary.iterdir()) if file.name not in files})
        (temporary / MANIFEST).write_text(json.dumps(dict(sorted(files.items())), indent=2), encoding="utf-8")
        for file in temporary.iterdir():
            _fsync(file)
        fsync_dir(temporary)
        remove(final)
        temporary.rename(final)
        fsync_dir(root)

    for stage, is_mine in ((begin, world.is_main), (write, True), (publish, world.is_main)):
        error = _attempt(stage) if is_mine else None
        told = ""
        for problem, described in distributed.of_all((error and str(error), files), world):
            told = told or problem or ""
            files |= described
        if told:
            shutil.rmtree(temporary, ignore_errors=True) if world.is_main else None
            raise RunError(f"{final}: the checkpoint could not be written ({told}); earlier checkpoints are untouched") from error
    if world.is_main:
        there = published(root)
        # a later one is damaged, and this run has gone back behind it
        later = there.index(final)
        for old in there[:later] + there[later + max(keep, 1) :]:
            remove(old)
    return final


def load_latest(root: Path, learner: nn.Module, optimizer: torch.optim.Optimizer | None, world: World = ALONE) -> dict[str, Any] | None:
    """Restore the newest checkpoint and return its state, or None where there is none. RunError names one that is damaged: whoever deletes
    it has said that the one before it is to be used."""
    there = distributed.of_all(published(root), world)[0]
    for path in there[:1]:
        before = f"from {there[1].name}" if len(there) > 1 else "from the beginning"
        refuse_damaged(path, world, before if optimizer is not None else "without it")
        try:
            _restore(learner, optimizer, path, world)
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            return {**state, "step": int(state["step"])}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:  # whoever writes the files can write checksums too
            raise RunError(f"{path}: damaged: not what a checkpoint holds ({type(error).__name__}: {error})") from error
    return None


def refuse_damaged(path: Path, world: World, otherwise: str) -> None:
    """RunError, on all ranks alike, where a checkpoint is not what was written. `otherwise` is how a run goes on when it is deleted."""
    problem = next(filter(None, distributed.of_all(_problem(path, world), world)), None)
    if problem:
        raise RunError(f"{path}: damaged: {problem}. Delete this folder to go on {otherwise}")


def remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that a kill half-way leaves no half checkpoint under a valid name."""
    if path.exists():
        doomed = path.with_name(path.name + _TEMPORARY + "-old")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def clean(root: Path) -> None:
    """Remove what killed processes left half-written."""
    for path in root.glob(f"step-*{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def published(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in root.glob("step-*") if _TEMPORARY not in path.name), reverse=True)


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """Finished steps of the checkpoints in a folder, newest first."""
    names = (path.name.removeprefix("step-") for path in published(root))
    return [int(name) for name in names if name.isdecimal()]


def weights(learner: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained (tied ones once) and persistent buffers. What is frozen comes from the student's model again."""
    state = learner.state_dict()
    buffers = {name: buffer for name, buffer in learner.named_buffers() if name in state}
    trained = {name: parameter for name, parameter in learner.named_parameters() if parameter.requires_grad}
    return {name: value.detach() for name, value in (*trained.items(), *buffers.items())}


def _optimizer_state(learner: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}:{name}": value
        for name, parameter in learner.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _write(folder: Path, learner: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None, world: World) -> None:
    if distributed.is_divided(learner.values()):
        distributed.write_parts({**learner, **(optimizer or {})}, dict.fromkeys(learner, 1) | dict.fromkeys(optimizer or {}, 2), folder)
    elif world.is_main:
        for name, tensors in ((WEIGHTS, learner), *([] if optimizer is None else [(OPTIMIZER, optimizer)])):
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)


def _restore(learner: nn.Module, optimizer: torch.optim.Optimizer | None, path: Path, world: World) -> None:
    parameters, ours, found = dict(learner.named_parameters()), weights(learner), distributed.stored(path)
    state = {label: label.split(":", 1) for label in found if label not in ours}
    is_other = any(found.get(name) != tuple(value.shape) for name, value in ours.items())
    if is_other or any(len(parts) != 2 or parts[1] not in parameters for parts in state.values()):
        raise RunError(f"{path}: holds other weights than this recipe's student and projections; use another run directory")
    targets: dict[str, Tensor] = {}
    for label, (key, name) in state.items():
        parameter = parameters[name]
        same = found[label] == tuple(parameter.shape)
        # the step counter is on the weights' device too: a fused AdamW has it there
        targets[label] = torch.zeros_like(parameter.detach()) if same else torch.zeros(found[label], device=parameter.device)
        if optimizer is not None:
            optimizer.state[parameter][key] = targets[label]
    distributed.read_into({**ours, **targets}, path, world)


def _problem(path: Path, world: World) -> str | None:
    """Why a checkpoint cannot be used, or None. Each process reads its share of the files."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        there = {file.name for file in path.iterdir()} - {MANIFEST}
        if missing := sorted(({STATE} | set(files)) - there):
            return f"{missing[0]} is missing"
        if strange := sorted(there - set(files)):
            return f"{strange[0]} is not in its {MANIFEST}"
        if not any(name.endswith(".safetensors") for name in files):
            return f"{MANIFEST} names no tensors"
        for name in sorted(files)[world.rank :: world.size]:
            if _describe(path / name) != files[name]:
                return f"{name} was cut or altered"
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return f"{MANIFEST} is not readable ({error})"
    return None


def _attempt(stage: Callable[[], None]) -> Exception | None:
    """Do it; the error of a disk or of a file if there is one."""
    try:
        stage()
    except (OSError, SafetensorError) as error:
        return error
    return None


def _describe(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _fsync(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
