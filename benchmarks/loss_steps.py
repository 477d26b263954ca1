"""A whole training step by every loss that is registered, against cross-entropy and forward KL on the same tokens.

A step is forward, backward, clipping and AdamW on the demo's student, 14 blocks of SmolLM2-135M-Instruct, V = 49,152. A contestant is
cross-entropy and the divergence or term of its name, with its defaults (`ce` is cross-entropy alone), so a new loss is timed the day it is
defined. The teacher is the exact capture: it costs its head at the scored tokens, which every dense loss needs, and no forward of its own,
which would hide what losses cost.

All contestants share one process and one student, whose objective changes from step to step, because two processes differ by more than
losses do. They take turns: in each round every one makes a step on the same conversations, in an order that rotates. The figures are
medians over rounds of the ratio to forward KL in the same round. Memory is the resident peak of a contestant's steps, in a process where
all share what stays: only differences mean something.

    python benchmarks/loss_steps.py [--batch-size 8] [--rounds 5] [--only jsd hidden] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from train_step import in_process, recipe_of

from limbeck.objectives import Divergence, HiddenTerm, Term

REFERENCE = "forward_kl"
AIM = 1.3
"""No loss shall take longer than this many times the reference's step."""
PAIRS = [[2, 3], [5, 11], [8, 20], [11, 27], [13, 29]]
"""Of blocks, for hidden terms: the demo's, whose capture holds the states."""


def contestants() -> dict[str, list[dict[str, Any]]]:
    """Objectives by name: each registered divergence, and each other term, beside cross-entropy."""
    ce, found = {"type": "ce"}, {"ce": [{"type": "ce"}]}
    found |= {name: [ce, {"type": "logits", "divergence": name}] for name in Divergence.members}
    for name, term in Term.members.items():
        if name not in ("ce", "logits"):
            found[name] = [ce, {"type": name, **({"pairs": PAIRS} if issubclass(term, HiddenTerm) else {})}]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="conversations per step")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=tuple(contestants()), help=f"run these only, and {REFERENCE}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options)
    print("\n" + table(result) + "\n", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(result["ratios"] | {"details": result}))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of every contestant's step in every round, and medians of their ratios to the reference."""
    import torch

    from limbeck.log import peak_memory_mb, reset_peak_memory

    torch.set_num_threads(options.threads)
    names = [name for name in contestants() if not options.only or name == REFERENCE or name in options.only]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    megabytes: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        steps = assembled(options, names, folder)
        for turn in range(options.rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                reset_peak_memory()
                start = time.perf_counter()
                steps[name](turn)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
                    megabytes[name].append(peak_memory_mb())
            print(f"round {turn} of {options.rounds}", file=sys.stderr)
    ratios = {
        name: statistics.median(mine / base for mine, base in zip(its, seconds[REFERENCE], strict=True)) for name, its in seconds.items()
    }
    settings = {key: getattr(options, key) for key in ("batch_size", "micro_batch_size", "rounds", "threads")}
    return {"settings": settings, "ratios": ratios, "seconds": seconds, "megabytes": megabytes}


def assembled(options: argparse.Namespace, names: list[str], folder: str) -> dict[str, Callable[[int], object]]:
    """By contestant, a function that takes optimizer step `n` with its objective; all train one student."""
    from torch import nn

    from limbeck import optim
    from limbeck.distributed import World
    from limbeck.models import load_tokenizer
    from limbeck.recipe import parse_recipe
    from limbeck.sources.base import microbatches
    from limbeck.step import optimizer_step
    from limbeck.student import build
    from limbeck.trainer import assemble

    options.store, options.steps, options.contestant = folder, options.rounds, "hidden"
    in_process("capture_exact", options)  # another process: a teacher's memory is not to be seen here
    base = parse_recipe(recipe_of(options), ["train.optimizer.learning_rate=1e-6"])  # all losses pull at one student, which is to stay one
    student_spec, spec = base.for_training()
    tokenizer = load_tokenizer(student_spec.model)
    source, student = base.source.open(tokenizer, base.seed), build(student_spec)
    parts = {}
    for name in names:
        recipe = parse_recipe(base.to_json() | {"objective": contestants()[name]})
        learner, scorer, _ = assemble(recipe, student, tokenizer, source, World())
        parts[name] = (learner.train(), scorer, recipe.terms)
    optimizer = optim.build(spec.optimizer, nn.ModuleList(learner for learner, _, _ in parts.values()))

    def step_of(name: str) -> Callable[[int], object]:
        from limbeck.batch import Signal

        learner, scorer, terms = parts[name]

        def step(number: int) -> object:
            samples = source.at(number, spec.batch_size)
            batches = microbatches(samples, spec.micro_batch_size, 0, 1, tokenizer.pad_token_id or 0, None)
            if scorer is not None:
                scorer.expect(batches)
            score = scorer.score if scorer is not None else lambda batch: Signal()
            return optimizer_step(learner, terms, batches, score, optimizer, spec, World())

        return step

    return {name: step_of(name) for name in names}


def table(result: dict[str, Any]) -> str:
    lines = [
        "{rounds} rounds of a step of {batch_size} conversations, {micro_batch_size} at a time, {threads} threads".format(
            **result["settings"]
        ),
        "",
        f"| beside ce | seconds per step (median, range) | of {REFERENCE}'s step | peak memory, MB |",
        "|---|---|---|---|",
    ]
    for name, its in result["seconds"].items():
        ratio = f"{result['ratios'][name]:.2f}" + (f" (above {AIM})" if result["ratios"][name] > AIM else "")
        memory = max(result["megabytes"][name])
        lines.append(f"| {name} | {statistics.median(its):.2f} ({min(its):.2f} to {max(its):.2f}) | {ratio} | {memory:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
