"""The trainer: one loop for all methods, and what it leaves on disk. It knows samples, steps and checkpoints; it knows no loss and no kind
of teacher. What happens within a step is in `step.py`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from limbeck import adapters, bookkeeping, checkpoint, distributed, kernels, not_finite, optim, stopping, trackers
from limbeck.batch import Batch, Signal
from limbeck.distributed import World
from limbeck.divide import divide, whole_student
from limbeck.errors import ModelError, RunError
from limbeck.evaluate import Subject
from limbeck.evaluate.runner import evaluate, holds
from limbeck.first_samples import FirstSamples, settle
from limbeck.learner import Learner
from limbeck.log import peak_memory_mb, progress, reset_peak_memory, say, warn
from limbeck.milestones import Milestones
from limbeck.models import blocks, check_size, load_model, load_tokenizer, recompute_activations, save_model, verify_packing, weights_hash
from limbeck.objectives.base import HiddenTerm, Needs, Term, needs_of
from limbeck.objectives.head import num_chunks
from limbeck.recipe import Recipe, parse_recipe, require_files
from limbeck.run import Run
from limbeck.sources.base import OpenSource, microbatches
from limbeck.step import NotFiniteError, StepResult, optimizer_step
from limbeck.student import build as build_student
from limbeck.teachers import Scorer
from limbeck.tokens.identity import vocabulary
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
            bookkeeping.refuse_others(run, recipe)
        distributed.barrier(world)
        if spec.uses("liger"):
            kernels.refuse_cpu(world.device)
        if run.is_finished and holds(run.evals(), recipe.evaluate, recipe.teacher):
            say(f"{path}: already finished with this recipe")
            return run
        tokenizer = load_tokenizer(student_spec.model, student_spec.revision)
        student = _trained_already(run, world) if run.is_trained else _trained(run, recipe, tokenizer, world)
        if world.is_main:
            _evaluate(run, recipe, student, tokenizer, world)
    return run


def _trained(run: Run, recipe: Recipe, tokenizer: Any, world: World) -> Any:
    """Train, and publish the student."""
    student_spec, spec = recipe.for_training()
    source = recipe.source.open(tokenizer, recipe.seed)
    for benchmark in recipe.evaluate:
        benchmark.samples(tokenizer)  # what cannot be graded shows before hours of training, not after
    student = build_student(student_spec, distributed.opens_on(recipe.parallel, world), recipe.seed)
    known = run.read_json("data.json", {}).get("layer_maps", {})
    learner, scorer, layer_maps = assemble(recipe, student, tokenizer, source, world, known)
    num_steps = steps_of(recipe, source)
    if world.is_main:
        bookkeeping.describe(run, recipe, source, student, tokenizer, num_steps, layer_maps)
    if spec.uses("liger"):  # behind all that calls models where they were opened: that may be main memory, and its kernels are Triton's
        kernels.use_liger(student)
    wrapped = divide(recipe, learner, scorer, world)
    milestones = Milestones(run, recipe, learner, tokenizer, num_steps, world)
    with stopping.deferred():
        _loop(run, recipe, learner, wrapped, source, scorer, milestones, tokenizer.pad_token_id or 0, world)
        not_finite.refuse_weights(learner, world, run.path, num_steps)
        milestones.take_best()
        student = whole_student(recipe, learner, world)
        if world.is_main:
            _export(run, recipe, student, tokenizer, milestones.best)
    return student


def steps_of(recipe: Recipe, source: OpenSource) -> int:
    """Optimizer steps of a whole run."""
    _, spec = recipe.for_training()
    return spec.steps or math.ceil((spec.epochs or 1) * source.steps_per_epoch(spec.batch_size))


def _trained_already(run: Run, world: World) -> Any:
    """The student of a run that was stopped while it was evaluated."""
    if not world.is_main:
        return None
    say(f"{run.path}: trained already; going on with its evaluation")
    student = load_model(str(run.student), device=world.device)
    if weights_hash(dict(student.named_parameters())) != run.read_json("run.json").get("weights_sha256"):
        raise RunError(f"{run.student}: the weights were altered since they were trained; delete {run.path} to train again")
    return student


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
    milestones: Milestones,
    pad_id: int,
    world: World,
) -> None:
    _, spec = recipe.for_training()
    terms, num_steps = recipe.terms, milestones.num_steps
    optimizer = optim.build(spec.optimizer, learner)
    checkpoint.clean(run.checkpoints) if world.is_main else None
    state = checkpoint.load_latest(run.checkpoints, learner, optimizer, world) or {"step": 0, "tokens": 0, "seconds": 0.0}
    first, tokens, spent, skipped = state["step"], state["tokens"], state["seconds"], state.get("skipped", 0)
    score = scorer.score if scorer is not None else lambda batch: Signal()
    expect = scorer.expect if scorer is not None else lambda batches: None
    if world.is_main:
        bookkeeping.forget(run.metrics_file, lambda row: row["step"] <= first)
    milestones.begin(first)
    if first:
        say(f"{run.path}: resuming after step {first} of {num_steps}")

    def batches_at(step: int) -> list[Batch]:
        samples = source.at(step, spec.batch_size)
        return microbatches(samples, spec.micro_batch_size, world.rank, world.size, pad_id, spec.pack_length)

    def save(root: Path, step: int, keep: int, **about: Any) -> None:
        """What a resume after so many steps begins with. Weights that no step could follow are no such thing."""
        not_finite.refuse_weights(learner, world, run.path, step)
        checkpoint.save(root, step, learner, optimizer, {"tokens": tokens, "seconds": spent, "skipped": skipped, **about}, keep, world)

    def reach(step: int) -> None:
        try:
            if row := milestones.reach(step):
                report(row)
        except stopping.Stopped:
            if step > saved:
                save(run.checkpoints, step, spec.keep_checkpoints)
            raise

    learner.train()
    reset_peak_memory()
    saved = first
    upcoming = batches_at(first) if first < num_steps else []
    expect(upcoming)
    report_to = spec.report_to if world.is_main else ()
    name = "/".join(run.path.parts[-2:])
    with trackers.tracking(report_to, run, first) as report, progress(f"train {name}", num_steps, first) as bar:
        reach(first)
        for step in range(first, num_steps):
            start = time.perf_counter()
            torch.manual_seed(seed_of(recipe.seed, step, world.rank))
            rate = spec.optimizer.rate(step, num_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            now = {key: term.at(step, num_steps) for key, term in terms.items()}
            batches, upcoming = upcoming, batches_at(step + 1) if step + 1 < num_steps else []
            expect(upcoming)
            try:
                result = optimizer_step(wrapped, now, batches, score, optimizer, spec, world)
                was_skipped = 0
            except stopping.Stopped:
                if step > saved:
                    save(run.checkpoints, step, spec.keep_checkpoints)
                raise
            except NotFiniteError as error:
                save(run.not_finite, step, 1, **not_finite.about(source.at(step, spec.batch_size), str(error)))
                told = f"{run.path}, step {step + 1}: {error}; {not_finite.how_to_replay(run.path)}"
                if skipped == spec.max_skipped_steps:
                    raise RunError(f"{told}. A lower learning rate is the usual cure{_after(skipped)}") from None
                warn(f"{told}; the step is skipped")
                result, was_skipped = error.result, skipped + 1
            except RunError as error:
                raise RunError(f"{run.path}, step {step + 1}: {error}") from None
            seconds = time.perf_counter() - start
            tokens, spent, skipped = tokens + int(result.counts["represented"]), spent + seconds, was_skipped
            if world.is_main:
                scheduled = {f"{name}/{key}": getattr(now[key], name) for key, term in terms.items() for name in term.schedules}
                report(bookkeeping.log_step(run, step + 1, result, terms, scheduled, rate, tokens, seconds, spent, skipped > 0))
            is_last = step + 1 == num_steps
            if spec.checkpoint_every and (
                spec.keep_checkpoints or spec.evaluate_every if is_last else (step + 1) % spec.checkpoint_every == 0
            ):
                save(run.checkpoints, step + 1, spec.keep_checkpoints)
                saved = step + 1
            bar.advance(1, note=_note(result, terms, seconds))
            reach(step + 1)


def _after(skipped: int) -> str:
    return f"; {skipped} before it were skipped, as many as train.max_skipped_steps allows" if skipped else ""


def _note(result: StepResult, terms: Mapping[str, Term], seconds: float) -> str:
    parts = " ".join(f"{key} {result.sums[key] / max(result.counts[term.count], 1):.3f}" for key, term in terms.items())
    return f"{parts} | {result.counts['represented'] / seconds:.0f} tok/s | {peak_memory_mb() / 1024:.1f} GB"


def seed_of(seed: int, step: int, rank: int) -> int:
    """Random numbers of a step (dropout) depend on nothing that came before it."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _export(run: Run, recipe: Recipe, student: Any, tokenizer: Any, best: Mapping[str, Any] | None) -> None:
    """Publish the student, and mark the run as trained. `best` says by what it was chosen."""
    adapters.save(student, run.adapters)
    adapters.merge(student)
    temporary = run.path / "student.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_model(student, tokenizer, temporary)
        shutil.rmtree(run.student, ignore_errors=True)
        temporary.rename(run.student)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    rows = run.metrics()
    last = rows[-1]
    run.write_json(
        "run.json",
        {
            "status": "trained",
            "steps": last["step"],
            "skipped_steps": sum(row.get("skipped", 0) for row in rows),
            "tokens": last["tokens"],
            "scored_tokens": sum(row["scored_tokens"] for row in rows),
            "train_seconds": last["seconds"],
            "tokens_per_second": last["tokens"] / last["seconds"],
            "teacher_share": sum(row["teacher_share"] for row in rows) / len(rows),
            "peak_memory_mb": max(row["peak_memory_mb"] for row in rows),
            "weights_sha256": weights_hash(dict(student.named_parameters())),
            **({"best": best} if best else {}),
        },
    )
    _, spec = recipe.for_training()
    if not spec.keep_checkpoints or not spec.checkpoint_every:  # a stop leaves one even where none are asked for
        shutil.rmtree(run.checkpoints, ignore_errors=True)


def _evaluate(run: Run, recipe: Recipe, student: Any, tokenizer: Any, world: World) -> None:
    """Grade the student, and mark the run as finished."""
    shutil.rmtree(run.best, ignore_errors=True)  # what was best is the student now
    student.eval()
    subject = Subject(student, tokenizer, world.device, recipe.teacher)
    totals = run.read_json("run.json")
    seen = run.evals_after(totals.get("best", {}).get("step", totals["steps"]))
    for result in evaluate(recipe.evaluate, subject, run.path / "evals", seen):
        run.write_json(f"evals/{result.name}.json", result.to_json())
    run.write_json("run.json", totals | {"status": "finished"})
