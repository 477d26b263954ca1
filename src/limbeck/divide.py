"""Live models among processes: how the learner and a live teacher are divided, and how the student comes together again.

Without `parallel: {strategy: fsdp2}`, or alone, both functions give back what they were given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from limbeck import checkpoint, distributed, heap
from limbeck.distributed import World
from limbeck.learner import Learner
from limbeck.models import backbone, blocks, head
from limbeck.recipe import Recipe
from limbeck.student import build
from limbeck.teachers import Scorer
from limbeck.teachers.model import ModelScorer


def divide(recipe: Recipe, learner: Learner, scorer: Scorer | None, world: World) -> nn.Module:
    """The learner as it is to be called. A teacher's head stays whole in every process, as the objective applies it where nothing is
    gathered; other teachers than live ones have no weights here.

    In main memory, what is gathered comes and goes in many sizes, and the whole models that were read leave room between what stays.
    """
    _, spec = recipe.for_training()
    if not recipe.parallel.is_sharded(world.size):
        return distributed.wrap(learner, list(blocks(learner.student)), recipe.parallel, world, spec.precision)
    heap.without_holes(True)
    wrapped = _sharded(recipe, learner, scorer, world)
    heap.give_back()
    return wrapped


def _sharded(recipe: Recipe, learner: Learner, scorer: Scorer | None, world: World) -> nn.Module:
    _, spec = recipe.for_training()
    live = scorer if isinstance(scorer, ModelScorer) else None
    is_shared = live is not None and live.model is learner.student
    whole = _head_parameters(learner.student) if is_shared else []
    wrapped = distributed.wrap(learner, list(blocks(learner.student)), recipe.parallel, world, spec.precision, whole)
    if live is None:
        return wrapped
    if is_shared:  # a frozen base whose weights only the learner can gather
        distributed.calls_through(learner, "states")
        live.states = learner.states
    elif not recipe.parallel.shard_teacher:
        live.model.to(world.device)
    else:
        kept = _head_parameters(live.model)
        distributed.shard(backbone(live.model), list(blocks(live.model)), recipe.parallel, world, whole=kept, keeps_root=False)
    live.head = head(live.model).cut(live.vocabulary)
    return wrapped


def whole_student(recipe: Recipe, learner: Learner, world: World) -> Any:
    """On rank 0 the student with all its weights; where it was divided, built as at first and given what was trained. None elsewhere."""
    weights = checkpoint.weights(learner)
    if not distributed.is_divided(weights.values()):
        return learner.student if world.is_main else None
    gathered = distributed.gather(weights, world)
    if not world.is_main:
        return None
    spec, _ = recipe.for_training()
    student = build(spec, world.device, recipe.seed)
    own = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    with torch.no_grad():
        for name, value in gathered.items():
            part, _, rest = name.partition(".")
            if part == "student":
                own[rest].copy_(value)
    return student


def _head_parameters(model: Any) -> list[nn.Parameter]:
    """Of the output head; with tied embeddings its weight is theirs."""
    layer = model.get_output_embeddings()
    return [parameter for parameter in (layer.weight, getattr(layer, "bias", None)) if parameter is not None]
