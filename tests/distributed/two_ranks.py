"""What the two processes of `test_fsdp2.py` do, in one launch, as starting takes most of the time: `torchrun two_ranks.py WORK OUT`.

WORK holds `steps`, recipes by name, of whose first step the gradients are compared with those of one process, and `runs`, recipes that are
trained one after the other, each in a new directory or from a copy of one that was stopped after its first checkpoint.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import limbeck
from helpers import large_blocks_have_pages
from limbeck import distributed
from limbeck.batch import Signal
from limbeck.distributed import ALONE, World, world
from limbeck.divide import divide
from limbeck.models import load_tokenizer
from limbeck.recipe import Recipe, parse_recipe
from limbeck.sources.base import microbatches
from limbeck.step import StepResult, optimizer_step
from limbeck.student import build
from limbeck.trainer import assemble


def step(recipe: Recipe, among: World) -> tuple[StepResult, Any]:
    """The first optimizer step, with a learning rate of 0; its result, and the learner with its gradients."""
    student_spec, spec = recipe.for_training()
    tokenizer = load_tokenizer(student_spec.model)
    source = recipe.source.open(tokenizer, recipe.seed)
    student = build(student_spec, "cpu", recipe.seed)
    learner, scorer, _ = assemble(recipe, student, tokenizer, source, among)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in learner.named_parameters():
        if "lora_B" in name:  # else adapters would change nothing, and a base as teacher would have nothing to teach
            parameter.data.normal_(std=0.1, generator=generator)
    wrapped = divide(recipe, learner, scorer, among)
    optimizer = torch.optim.SGD([parameter for parameter in learner.parameters() if parameter.requires_grad], lr=0.0)
    batches = microbatches(source.at(0, spec.batch_size), spec.micro_batch_size, among.rank, among.size, 2, spec.pack_length)
    score = scorer.score if scorer is not None else lambda batch: Signal()
    return optimizer_step(wrapped, recipe.terms, batches, score, optimizer, spec, among), learner


def gradients(learner: Any, among: World) -> dict[str, Tensor]:
    given = {name: parameter.grad for name, parameter in learner.named_parameters() if parameter.grad is not None}
    return distributed.gather(given, among)


def compared(recipe: Recipe, among: World) -> dict[str, Any]:
    """How far the gradients are from those of one process, at most, as a share of the largest; which are missing; and what is logged."""
    ours, learner = step(recipe, among)
    has_pages = large_blocks_have_pages()
    found = gradients(learner, among)
    if not among.is_main:
        return {}
    alone, reference = step(recipe, ALONE)
    expected = gradients(reference, ALONE)
    largest = max(value.abs().max().item() for value in expected.values())
    both = found.keys() & expected.keys()
    return {
        "error": max((found[name] - expected[name]).abs().max().item() for name in both) / largest,
        "missing": sorted(found.keys() ^ expected.keys()),
        "is_divided": distributed.is_divided(learner.parameters()),
        "large_blocks_have_pages": has_pages,
        "values": [ours.loss, ours.grad_norm, *ours.sums.values()],
        "expected": [alone.loss, alone.grad_norm, *alone.sums.values()],
    }


def norm_of_a_broken_part(recipe: Recipe, among: World) -> list[float]:
    """The gradient's norm as each rank finds it, where one rank's part of one gradient holds a number that is none."""
    _, learner = step(recipe, among)
    trained = [parameter for parameter in learner.parameters() if parameter.grad is not None]
    if among.rank == 1:
        trained[0].grad.to_local().view(-1)[0] = float("nan")
    return distributed.of_all(distributed.clip_gradients(trained, 1.0), among)


def stopped(there: Path, here: Path, after: int) -> None:
    """A copy of a run as a kill leaves it that comes after a checkpoint."""
    shutil.copytree(there, here)
    for path in (*here.glob("checkpoints/step-*"), here / "student", here / "adapters"):
        if not path.name.endswith(f"{after:08d}"):
            shutil.rmtree(path, ignore_errors=True)
    (here / "run.json").write_text('{"status": "running"}')


def main(work: dict[str, Any], out: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"steps": {}}
    with world() as among:
        for name, tree in work["steps"].items():
            found["steps"][name] = compared(parse_recipe(tree), among)
        found["broken"] = norm_of_a_broken_part(parse_recipe(work["broken"]), among)
        for run in work["runs"]:
            if among.is_main and "from" in run:
                stopped(Path(run["from"]), Path(run["path"]), run["after"])
            distributed.barrier(among)
            limbeck.train(run["recipe"], run["path"])
            distributed.barrier(among)
        if among.is_main:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
