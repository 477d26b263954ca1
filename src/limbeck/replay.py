"""Replay: an optimizer step that was infinite or no number is done again from what was kept of it, then sample by sample, to say where it
comes from. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import checkpoint, optim
from limbeck.batch import Batch, Signal
from limbeck.distributed import world
from limbeck.errors import RunError
from limbeck.learner import Learner
from limbeck.log import console, say
from limbeck.models import load_tokenizer
from limbeck.not_finite import is_finite
from limbeck.recipe import parse_recipe, require_files
from limbeck.run import Run
from limbeck.sources.base import microbatches
from limbeck.step import NotFiniteError, optimizer_step
from limbeck.student import build
from limbeck.tokens.pad import pad
from limbeck.trainer import assemble, seed_of, steps_of


def replay(path: str | Path) -> dict[str, Any]:
    """What the step gives that RUN/not-finite holds: as a whole, and for each of its samples the terms, the gradient's norm, and what was
    the first not to be finite."""
    run = Run(Path(path))
    recipe = parse_recipe(run.read_json("recipe.json"), where=f"{run.path}/recipe.json")
    student_spec, spec = recipe.for_training()
    if not run.not_finite.is_dir():
        raise RunError(f"{run.not_finite}: no such folder; expected a run with a step that was not finite")
    require_files(recipe)
    with world() as here:
        tokenizer = load_tokenizer(student_spec.model, student_spec.revision)
        source = recipe.source.open(tokenizer, recipe.seed)
        student = build(student_spec, here.device, recipe.seed)
        known = run.read_json("data.json", {}).get("layer_maps", {})
        learner, scorer, _ = assemble(recipe, student, tokenizer, source, here, known)
        optimizer = optim.build(spec.optimizer, learner)
        state = checkpoint.load_latest(run.not_finite, learner, optimizer)
        if state is None:
            raise RunError(f"{run.not_finite}: found no step, expected the one that was kept")
        step = state["step"]
        samples = source.at(step, spec.batch_size)
        if [sample.sample_id for sample in samples] != state["samples"]:
            raise RunError(f"{run.not_finite}: step {step + 1} took other samples; the data, the tokenizer or its template were changed")
        now = {key: term.at(step, steps_of(recipe, source)) for key, term in recipe.terms.items()}
        score = scorer.score if scorer is not None else lambda batch: Signal()
        learner.train()
        torch.manual_seed(seed_of(recipe.seed, step, 0))
        pad_id = tokenizer.pad_token_id or 0
        try:
            batches = microbatches(samples, spec.micro_batch_size, 0, 1, pad_id, spec.pack_length)
            result = optimizer_step(learner, now, batches, score, optimizer, spec, here)
        except NotFiniteError as error:
            result = error.result
        else:  # the optimizer has changed the weights
            checkpoint.load_latest(run.not_finite, learner, optimizer)
        counts = {key: max(result.counts[term.count], 1) for key, term in now.items()}
        scales = {key: term.weight / counts[key] for key, term in now.items()}
        rows = []
        for sample in samples:
            torch.manual_seed(seed_of(recipe.seed, step, 0))
            batch = pad([sample], pad_id).to(here.device)
            with torch.autocast(torch.device(here.device).type, torch.bfloat16, enabled=spec.precision == "bfloat16"):
                found = _alone(learner, batch, score(batch), scales, now)
            rows.append({"sample": int(sample.sample_id), "tokens": len(sample.ids), **found})
    is_fine = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
    whole = {"step": step + 1, "loss": _told(result.loss), "grad_norm": _told(result.grad_norm), "was": state["why"]}
    return {**whole, "is_finite": is_fine, "samples": rows}


def _alone(learner: Learner, batch: Batch, signal: Signal, scales: dict[str, float], terms: Any) -> dict[str, Any]:
    """What one sample gives."""
    first = [f"teacher: {name}" for name, value in _tensors(signal) if not is_finite(value)][:1]
    learner.zero_grad(set_to_none=True)
    with _watching(learner, first):
        loss, sums = learner(batch, signal, scales, terms)
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in learner.named_parameters() if parameter.grad is not None}
    norm = float(nn.utils.get_total_norm(list(gradients.values())))
    first += [f"loss: {key}" for key, value in sums.items() if not is_finite(value)][:1]
    first += [f"gradient: {name}" for name, value in reversed(gradients.items()) if not is_finite(value)][:1]
    told = {key: _told(float(value)) for key, value in sums.items()}
    return {"sums": told, "grad_norm": _told(norm), "first": first[0] if first else ""}


def _told(value: float) -> float | str:
    """A number, or in words what is none: JSON has no other way."""
    return value if math.isfinite(value) else str(value)


@contextmanager
def _watching(learner: nn.Module, first: list[str]) -> Iterator[None]:
    """Add the name of the first module whose output is not finite, where nothing was before it."""

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            if not first and any(isinstance(value, Tensor) and not is_finite(value) for value in values):
                first.append(f"output: {name}")

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in learner.named_modules() if not list(module.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(signal: Signal) -> list[tuple[str, Tensor]]:
    """What a teacher says of samples as numbers that have to be finite; log-probabilities of nothing are -inf by right."""
    named = [("output", signal.output), ("observed", signal.observed)]
    named += [(f"hidden state {layer}", state) for layer, state in signal.hidden.items()]
    return [(name, value) for name, value in named if value is not None]


def show(found: dict[str, Any]) -> None:
    """The step and a table of its samples, for people."""
    from rich.table import Table

    samples: Sequence[dict[str, Any]] = found["samples"]
    say(f"step {found['step']}: loss {found['loss']}, gradient norm {found['grad_norm']}; it was: {found['was']}")
    terms = list(samples[0]["sums"]) if samples else []
    table = Table("sample", "tokens", *terms, "gradient norm", "first that is not finite")
    for row in samples:
        numbers = [f"{float(value):.4g}" for value in (*(row["sums"][key] for key in terms), row["grad_norm"])]
        table.add_row(str(row["sample"]), str(row["tokens"]), *numbers, row["first"])
    console.print(table)
