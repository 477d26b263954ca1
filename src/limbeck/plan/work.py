"""How much there is to do: steps, tokens, positions that are computed (padding included), and bytes on disk. No model loads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from limbeck.plan.memory import FLOAT, Shapes, Sizes
from limbeck.recipe import Capture, Recipe
from limbeck.sources.base import OpenSource
from limbeck.store.codec import Exact
from limbeck.tokens.pack import lay_out, most_scored, row_tokens

SLACK_MB = 4
"""Tokenizer, logs and the other small files of a run."""


@dataclass(frozen=True)
class Work:
    """Of the whole run."""

    num_steps: int
    tokens: int
    positions: int
    shapes: Shapes


def work(recipe: Recipe, source: OpenSource, num_tokens: int, processes: int = 1) -> Work:
    """Steps are looked at one by one: what is padded depends on which samples meet."""
    _, spec = recipe.for_training()
    num_steps = spec.steps or math.ceil((spec.epochs or 1) * source.steps_per_epoch(spec.batch_size))
    tokens = positions = microbatches = 0
    largest, scored = (1, 1), 1
    for step in range(num_steps):
        samples = source.at(step, spec.batch_size)
        tokens += sum(len(sample.ids) for sample in samples)
        layout = lay_out(samples, spec.micro_batch_size, spec.pack_length)
        microbatches = max(microbatches, -(-len(layout) // processes))
        for rows in layout:
            width = max(map(row_tokens, rows))
            positions += len(rows) * width
            if len(rows) * width > largest[0] * largest[1]:
                largest = len(rows), width
            scored = max(scored, sum(sample.num_scored for row in rows for sample in row))
    bound = most_scored(source.samples, spec.micro_batch_size, spec.pack_length)
    shapes = Shapes(*largest, min(scored, largest[0] * largest[1]), bound, microbatches, num_tokens, spec.pack_length is not None)
    return Work(num_steps, tokens, positions, shapes)


def disk(recipe: Recipe, source: OpenSource, sizes: Sizes) -> dict[str, int | None]:
    """Bytes by part. While a checkpoint is written there is one more than is kept. None: known only when it is measured."""
    _, spec = recipe.for_training()
    held = max(spec.keep_checkpoints, 1) + 1 if spec.checkpoint_every else 0
    found: dict[str, int | None] = {"student": FLOAT * sizes.saved + SLACK_MB * 2**20, "checkpoints": held * 3 * FLOAT * sizes.trained}
    if spec.best is not None:
        found["best"] = (held or 1) * FLOAT * sizes.trained + FLOAT * sizes.trained
    if recipe.capture is not None:
        found["capture"] = _captured(recipe, recipe.capture, source)
    return found


def _captured(recipe: Recipe, capture: Capture, source: OpenSource) -> int | None:
    """The teacher's rows at scored tokens and its states at all tokens, without what compression saves."""
    width, number = recipe.teacher.provides().width, 2 if getattr(recipe.teacher, "dtype", "") == "bfloat16" else FLOAT
    scored, tokens = sum(sample.num_scored for sample in source.samples), sum(len(sample.ids) for sample in source.samples)
    each: Any = capture.bytes_per_token or getattr(capture.codec, "bytes_per_token", None)
    if isinstance(capture.codec, Exact) and width is not None:
        each = width * number
    if each is None or width is None or capture.target_kl is not None:
        return None
    _, needs, _ = recipe.for_capture()
    return int(scored * each + tokens * len(needs.layers) * width * number)
