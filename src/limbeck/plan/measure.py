"""Time and memory of a few real steps here: the run's own steps on its own data, and nothing is kept of them."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from limbeck import optim
from limbeck.batch import Signal
from limbeck.distributed import world
from limbeck.log import peak_memory_mb, progress, reset_peak_memory
from limbeck.models import load_tokenizer
from limbeck.recipe import Recipe
from limbeck.sources.base import microbatches
from limbeck.step import optimizer_step
from limbeck.student import build
from limbeck.trainer import assemble


@dataclass(frozen=True)
class Measured:
    """Seconds per computed position, the median over steps, and the peak of memory in bytes."""

    seconds_per_position: float
    peak: float
    num_steps: int


def measure(recipe: Recipe, num_steps: int) -> Measured:
    """One step to warm up, then `num_steps` that count, in the order of the run. Loads the models."""
    student_spec, spec = recipe.for_training()
    with world() as here:
        tokenizer = load_tokenizer(student_spec.model, student_spec.revision)
        source = recipe.source.open(tokenizer, recipe.seed)
        student = build(student_spec, here.device, recipe.seed)
        learner, scorer, _ = assemble(recipe, student, tokenizer, source, here)
        optimizer = optim.build(spec.optimizer, learner)
        score = scorer.score if scorer is not None else lambda batch: Signal()
        learner.train()
        reset_peak_memory()
        found = []
        with progress("measure", num_steps + 1) as bar:
            for step in range(num_steps + 1):
                samples = source.at(step, spec.batch_size)
                batches = microbatches(samples, spec.micro_batch_size, here.rank, here.size, tokenizer.pad_token_id or 0, spec.pack_length)
                if scorer is not None:
                    scorer.expect(batches)
                start = time.perf_counter()
                now = {key: term.at(step, num_steps + 1) for key, term in recipe.terms.items()}
                optimizer_step(learner, now, batches, score, optimizer, spec, here)
                positions = sum(batch.input_ids.numel() for batch in batches)
                found.append((time.perf_counter() - start) / positions)
                bar.advance(1)
    return Measured(statistics.median(found[1:]), peak_memory_mb() * 2**20, num_steps)
