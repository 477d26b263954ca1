"""What is infinite or no number: weights are refused, and a step whose loss or gradient is so is kept to be replayed.

RUN/not-finite/step-00000006/   a checkpoint of the 6 steps before it; its state.json says which samples the seventh took, and why not
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import distributed
from limbeck.distributed import World
from limbeck.errors import RunError

NAMED = 3
"""Weights that a message names."""


def refuse_weights(learner: nn.Module, world: World, where: str | os.PathLike[str], step: int) -> None:
    """RunError, on all ranks alike, where a trained weight is not finite: no step that follows could be."""
    found = [name for name, parameter in learner.named_parameters() if parameter.requires_grad and not is_finite(parameter)]
    if distributed.any_rank(bool(found), world):
        names = ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "") or "those of another process"
        raise RunError(
            f"{where}: after step {step} weights are infinite or no number ({names}), so nothing of them is written; a lower learning rate "
            "is the usual cure. A checkpoint of a step before is good, and `train.checkpoint_every` writes them"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are, of the part that is here."""
    here: Any = tensor.detach()
    return bool(torch.isfinite(here.to_local() if hasattr(here, "to_local") else here).all())


def about(samples: Sequence[Any], why: str) -> dict[str, Any]:
    """What the state of the kept step says of it."""
    return {"samples": [int(sample.sample_id) for sample in samples], "why": why}


def how_to_replay(path: Path) -> str:
    return f"`limbeck replay {path}` does the step again, sample by sample"
