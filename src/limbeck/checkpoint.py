"""Checkpoints: a folder that is there whole or not at all, verified by checksums before it is used. Safetensors and JSON only.

    checkpoints/step-00000024/  learner.safetensors  optimizer.safetensors  state.json  manifest.json

The learning rate, the data order and the random numbers are pure functions of (seed, step), so weights, optimizer state and the
step number are all that a bit-exact resume needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.errors import RunError
from limbeck.run import fsync_dir

MANIFEST = "manifest.json"
WEIGHTS, OPTIMIZER, STATE = "learner.safetensors", "optimizer.safetensors", "state.json"
_TEMPORARY = ".tmp"


def save(root: Path, step: int, learner: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` finished steps and delete all but the newest `keep` (at least one)."""
    final = root / f"step-{step:08d}"
    temporary = root / f"{final.name}{_TEMPORARY}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(_weights(learner), temporary / WEIGHTS)
        save_file(_optimizer_state(learner, optimizer), temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps({**state, "step": step}), encoding="utf-8")
        files = {file.name: _describe(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(files, indent=2), encoding="utf-8")
        for file in temporary.iterdir():
            _fsync(file)
        fsync_dir(temporary)
        remove(final)
        temporary.rename(final)
        fsync_dir(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{final}: the checkpoint could not be written ({error}); earlier checkpoints are untouched") from error
    published = _published(root)
    # a later one is damaged, and this run has gone back behind it
    later = published.index(final)
    for old in published[:later] + published[later + max(keep, 1) :]:
        remove(old)
    return final


def load_latest(root: Path, learner: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore the newest checkpoint and return its state, or None where there is none. RunError names one that is damaged: whoever deletes
    it has said that the one before it is to be used."""
    published = _published(root)
    for path in published[:1]:
        problem = _problem(path)
        if problem:
            before = f"from {published[1].name}" if len(published) > 1 else "from the beginning"
            raise RunError(f"{path}: damaged: {problem}. Delete this folder to go on {before}")
        device = next(learner.parameters()).device
        try:
            _restore(learner, optimizer, load_file(path / WEIGHTS), load_file(path / OPTIMIZER), device, path)
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            return {**state, "step": int(state["step"])}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:  # whoever writes the files can write checksums too
            raise RunError(f"{path}: damaged: not what a checkpoint holds ({type(error).__name__}: {error})") from error
    return None


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


def _published(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in root.glob("step-*") if _TEMPORARY not in path.name), reverse=True)


def _weights(learner: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained (tied ones once) and persistent buffers. What is frozen comes from the student's model again."""
    state = learner.state_dict()
    buffers = {name: buffer for name, buffer in learner.named_buffers() if name in state}
    trained = {name: parameter for name, parameter in learner.named_parameters() if parameter.requires_grad}
    return {name: value.detach().contiguous() for name, value in (*trained.items(), *buffers.items())}


def _optimizer_state(learner: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}:{name}": value.contiguous()
        for name, parameter in learner.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore(
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    state: dict[str, Tensor],
    device: torch.device,
    path: Path,
) -> None:
    ours = _weights(learner)
    if set(ours) != set(weights) or any(ours[name].shape != weights[name].shape for name in ours):
        raise RunError(f"{path}: holds other weights than this recipe's student and projections; use another run directory")
    parameters = dict(learner.named_parameters())
    with torch.no_grad():
        for name, value in (*parameters.items(), *learner.named_buffers()):
            if name in weights:
                value.copy_(weights[name])
    for label, value in state.items():
        key, name = label.split(":", 1)
        optimizer.state[parameters[name]][key] = value.to(device)  # the step counter too: a fused AdamW has it beside the weights


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in (WEIGHTS, OPTIMIZER, STATE):
            if not (path / name).is_file():
                return f"{name} is missing"
            if _describe(path / name) != files.get(name):
                return f"{name} was cut or altered"
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return f"{MANIFEST} is not readable ({error})"
    return None


def _describe(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _fsync(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
