"""The trainer: one loop for all methods, and what it leaves on disk. It knows samples, steps and checkpoints; it knows no loss and no kind
of teacher. What happens within a step is in `step.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from limbeck import adapters, checkpoint, distributed, kernels, optim, trackers
from limbeck.batch import Batch, Signal
from limbeck.distributed import World
from limbeck.divide import divide, whole_student
from limbeck.errors import ModelError, RunError
from limbeck.evaluate import Subject
from limbeck.evaluate.runner import evaluate
from limbeck.first_samples import FirstSamples, settle
from limbeck.learner import Learner
from limbeck.log import peak_memory_mb, progress, reset_peak_memory, say
from limbeck.models import blocks, check_size, load_tokenizer, recompute_activations, save_model, verify_packing, weights_hash
from limbeck.objectives.base import HiddenTerm, Needs, Term, gates, needs_of
from limbeck.objectives.head import num_chunks
from limbeck.recipe import Recipe, parse_recipe, require_files
from limbeck.run import Run, differences, environment, what_is_run
from limbeck.sources.base import OpenSource, microbatches
from limbeck.step import StepResult, optimizer_step
from limbeck.student import build as build_student
from limbeck.teachers import Scorer
from limbeck.tokens.identity import template_hash, vocabulary, vocabulary_hash
from limbeck.tokens.pack import most_scored


def train(recipe: Recipe | dict[str, Any] | str | Path, path: str | Path, overrides: Iterable[str] = ()) -> Run:
    """Train the recipe's student in the run directory `path`: fresh, resumed from its checkpoint, or returned as it is if finished."""
    recipe = parse_recipe(recipe, overrides)
    student_spec, spec = recipe.for_training()
    require_files(recipe)
    run = Run(Path(path))
    with distributed.world() as world:
        recipe.parallel.check(world.size, recipe.teacher)
        if world.is_main:
            _refuse_others(run, recipe)
        distributed.barrier(world)
        if spec.uses("liger"):
            kernels.refuse_cpu(world.device)
        if run.is_finished:
            say(f"{path}: already finished with this recipe")
            return run
        tokenizer = load_tokenizer(student_spec.model, student_spec.revision)
        source = recipe.source.open(tokenizer, recipe.seed)
        for benchmark in recipe.evaluate:
            benchmark.samples(tokenizer)  # what cannot be graded shows before hours of training, not after
        student = build_student(student_spec, distributed.opens_on(recipe.parallel, world), recipe.seed)
        if spec.uses("liger"):
            kernels.use_liger(student)
        known = run.read_json("data.json", {}).get("layer_maps", {})
        learner, scorer, layer_maps = assemble(recipe, student, tokenizer, source, world, known)
        num_steps = spec.steps or math.ceil((spec.epochs or 1) * source.steps_per_epoch(spec.batch_size))
        if world.is_main:
            _describe(run, recipe, source, student, tokenizer, num_steps, layer_maps)
        wrapped = divide(recipe, learner, scorer, world)
        _loop(run, recipe, learner, wrapped, source, scorer, num_steps, tokenizer.pad_token_id or 0, world)
        student = whole_student(recipe, learner, world)
        del scorer, learner, wrapped
        if world.is_main:
            _finish(run, recipe, student, tokenizer, world)
    return run


def assemble(
    recipe: Recipe, student: Any, tokenizer: Any, source: OpenSource, world: World, known: Mapping[str, Any] | None = None
) -> tuple[Learner, Scorer | None, dict[str, Any]]:
    """The learner, the opened teacher if any term of positive weight needs one, and layer maps that data decided. `known` are those with
    which a resumed run began."""
    _, spec = recipe.for_training()
    terms, device = recipe.terms, distributed.opens_on(recipe.parallel, world)
    if any(isinstance(term, HiddenTerm) for term in terms.values()):
        recipe.teacher.prepare()  # a layer map depends on how many blocks the teacher has
    provided = recipe.teacher.provides()
    needs = needs_of(terms, len(blocks(student)), provided.num_layers or 0) if provided.output else Needs()
    scorer = recipe.teacher.open_beside(student, tokenizer, needs, device) if needs.anything else None
    if scorer is not None:
        scorer.require(source.samples)
    num_tokens = scorer.vocabulary if scorer is not None else len(vocabulary(tokenizer))
    longest = max(len(sample.ids) for sample in source.samples)
    check_size(student, len(vocabulary(tokenizer)), longest)
    highest = max(int(sample.ids.max()) for sample in source.samples)
    if highest >= num_tokens:
        raise ModelError(
            f"the data has token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), expected one of the {num_tokens} that "
            "student and teacher share; take the token out of the data, or train without this teacher"
        )
    if spec.pack_length is not None:
        verify_packing(student)
        if scorer is not None:
            scorer.verify_packing()
    calibration = FirstSamples(student, scorer, source, device)
    settled, layer_maps = settle(terms, calibration, known or {}, world)
    if scorer is not None and layer_maps:
        scorer = scorer.asking(needs_of(settled, len(blocks(student)), scorer.num_layers))
    learner = Learner(
        student,
        settled,
        num_tokens,
        teacher_layers=scorer.num_layers if scorer else 0,
        teacher_width=scorer.width if scorer else 0,
        chunks=num_chunks(most_scored(source.samples, spec.micro_batch_size, spec.pack_length), num_tokens, spec.head_memory_mb),
        fused=spec.head == "fused",
        seed=recipe.seed,
        is_compiled=spec.uses("compile"),
    ).to(device)
    if spec.gradient_checkpointing:
        recompute_activations(student)
    learner.fit(calibration)
    return learner, scorer, layer_maps


def _loop(
    run: Run,
    recipe: Recipe,
    learner: Learner,
    wrapped: nn.Module,
    source: OpenSource,
    scorer: Scorer | None,
    num_steps: int,
    pad_id: int,
    world: World,
) -> None:
    _, spec = recipe.for_training()
    terms = recipe.terms
    optimizer = optim.build(spec.optimizer, learner)
    checkpoint.clean(run.checkpoints) if world.is_main else None
    state = checkpoint.load_latest(run.checkpoints, learner, optimizer, world) or {"step": 0, "tokens": 0, "seconds": 0.0}
    first, tokens, spent = state["step"], state["tokens"], state["seconds"]
    score = scorer.score if scorer is not None else lambda batch: Signal()
    expect = scorer.expect if scorer is not None else lambda batches: None
    if world.is_main:
        _forget_after(run, first)
    if first:
        say(f"{run.path}: resuming after step {first} of {num_steps}")

    def batches_at(step: int) -> list[Batch]:
        samples = source.at(step, spec.batch_size)
        return microbatches(samples, spec.micro_batch_size, world.rank, world.size, pad_id, spec.pack_length)

    learner.train()
    reset_peak_memory()
    upcoming = batches_at(first) if first < num_steps else []
    expect(upcoming)
    report_to = spec.report_to if world.is_main else ()
    name = "/".join(run.path.parts[-2:])
    with trackers.tracking(report_to, run, first) as report, progress(f"train {name}", num_steps, first) as bar:
        for step in range(first, num_steps):
            start = time.perf_counter()
            torch.manual_seed(_seed_of(recipe.seed, step, world.rank))
            rate = spec.optimizer.rate(step, num_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            now = {key: term.at(step, num_steps) for key, term in terms.items()}
            batches, upcoming = upcoming, batches_at(step + 1) if step + 1 < num_steps else []
            expect(upcoming)
            try:
                result = optimizer_step(wrapped, now, batches, score, optimizer, spec, world)
            except RunError as error:
                raise RunError(f"{run.path}, step {step + 1}: {error}") from None
            seconds = time.perf_counter() - start
            tokens, spent = tokens + int(result.counts["represented"]), spent + seconds
            if world.is_main:
                scheduled = {f"{name}/{key}": getattr(now[key], name) for key, term in terms.items() for name in term.schedules}
                report(_log(run, step + 1, result, terms, scheduled, rate, tokens, seconds, spent))
            if spec.checkpoint_every and (step + 1) % spec.checkpoint_every == 0 and step + 1 < num_steps:
                state = {"tokens": tokens, "seconds": spent}
                checkpoint.save(run.checkpoints, step + 1, learner, optimizer, state, spec.keep_checkpoints, world)
            bar.advance(1, note=_note(result, terms, seconds))
    if spec.checkpoint_every and spec.keep_checkpoints and first < num_steps:
        state = {"tokens": tokens, "seconds": spent}
        checkpoint.save(run.checkpoints, num_steps, learner, optimizer, state, spec.keep_checkpoints, world)


def _log(
    run: Run,
    step: int,
    result: StepResult,
    terms: Mapping[str, Term],
    scheduled: Mapping[str, float],
    rate: float,
    tokens: int,
    seconds: float,
    spent: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl: means per token of what was optimised, over all processes, and what schedules made of it."""
    row: dict[str, Any] = {"step": step, "loss": result.loss}
    row.update({f"loss/{key}": result.sums[key] / max(result.counts[term.count], 1) for key, term in terms.items()})
    row.update({key: result.sums[key] / max(result.counts["scored"], 1) for key in gates(terms)})
    if result.sums["teacher_nll"]:
        row["teacher_nll"] = result.sums["teacher_nll"] / max(result.counts["scored"], 1)
    row.update(scheduled)
    row.update(
        learning_rate=rate,
        grad_norm=result.grad_norm,
        tokens=tokens,
        scored_tokens=int(result.counts["scored"]),
        tokens_per_second=result.counts["represented"] / seconds,
        teacher_share=result.teacher_seconds / seconds,
        peak_memory_mb=peak_memory_mb(),
        seconds=spent,
    )
    with open(run.metrics_file, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _note(result: StepResult, terms: Mapping[str, Term], seconds: float) -> str:
    parts = " ".join(f"{key} {result.sums[key] / max(result.counts[term.count], 1):.3f}" for key, term in terms.items())
    return f"{parts} | {result.counts['represented'] / seconds:.0f} tok/s | {peak_memory_mb() / 1024:.1f} GB"


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Random numbers of a step (dropout) depend on nothing that came before it."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _refuse_others(run: Run, recipe: Recipe) -> None:
    """Refuse the directory of another recipe, or of something else."""
    if (run.path / "recipe.json").is_file():
        if differing := differences(what_is_run(run.read_json("recipe.json")), what_is_run(recipe.to_json())):
            others = "" if len(differing) == 1 else f", and {len(differing) - 1} more"
            raise RunError(
                f"{run.path}: holds a run of another recipe ({differing[0][1]}{others}); choose another run directory, or delete this one"
            )
        return
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise RunError(f"{run.path}: exists and is no run directory; choose another path")


def _describe(
    run: Run, recipe: Recipe, source: OpenSource, student: Any, tokenizer: Any, num_steps: int, layer_maps: dict[str, Any]
) -> None:
    """Take the directory, now that everything has loaded, and say what is trained on and what it starts from (data.json): two runs with
    equal hashes had equal budgets."""
    _, spec = recipe.for_training()
    initial = weights_hash(adapters.base_weights(student))
    before = run.read_json("data.json", {}).get("initial_weights_sha256", initial)
    if before != initial:
        raise RunError(f"{run.path}: began with a student of weights {before[:12]}, found {initial[:12]}; choose another run directory")
    run.write_json("recipe.json", recipe.to_json())
    run.write_json("environment.json", environment())
    run.write_json("run.json", {"status": "running"})
    order = hashlib.sha256()
    for step in range(num_steps):
        order.update(" ".join(str(sample.sample_id) for sample in source.at(step, spec.batch_size)).encode())
    run.write_json(
        "data.json",
        {
            **source.describe(),
            "num_steps": num_steps,
            **({"layer_maps": layer_maps} if layer_maps else {}),
            "order_sha256": order.hexdigest(),
            "initial_weights_sha256": initial,
            "vocabulary_sha256": vocabulary_hash(tokenizer),
            "template_sha256": template_hash(tokenizer),
        },
    )


def _forget_after(run: Run, step: int) -> None:
    """Drop logged steps that a resume will do again."""
    rows = [row for row in run.metrics() if row["step"] <= step]
    temporary = run.metrics_file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(run.metrics_file)


def _finish(run: Run, recipe: Recipe, student: Any, tokenizer: Any, world: World) -> None:
    """Export the student, evaluate it, and mark the run as finished."""
    adapters.save(student, run.adapters)
    adapters.merge(student)
    temporary = run.path / "student.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(student, tokenizer, temporary)
    shutil.rmtree(run.student, ignore_errors=True)
    temporary.rename(run.student)
    student.eval()
    subject = Subject(student, tokenizer, world.device, recipe.teacher)
    for result in evaluate(recipe.evaluate, subject, run.path / "evals"):
        run.write_json(f"evals/{result.name}.json", result.to_json())
    rows = run.metrics()
    last = rows[-1]
    run.write_json(
        "run.json",
        {
            "status": "finished",
            "steps": last["step"],
            "tokens": last["tokens"],
            "scored_tokens": sum(row["scored_tokens"] for row in rows),
            "train_seconds": last["seconds"],
            "tokens_per_second": last["tokens"] / last["seconds"],
            "teacher_share": sum(row["teacher_share"] for row in rows) / len(rows),
            "peak_memory_mb": max(row["peak_memory_mb"] for row in rows),
            "weights_sha256": weights_hash(dict(student.named_parameters())),
        },
    )
    if recipe.train is not None and not recipe.train.keep_checkpoints:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
