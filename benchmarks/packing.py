"""An optimizer step on the same conversations laid out in several ways: what padding costs, and what packing saves of it.

Rows in the order of the step, as a naive collator pads them; rows by length, as Limbeck lays out every step; and packed rows. The ways
take turns on every step, with a learning rate of 0, so that all see the same weights; seconds are those of the process, not of the
clock. Their losses are compared: a layout that changed them would be a bug and no saving.

    python benchmarks/packing.py [--data limbeck/demo-train] [--max-length 192] [--batch-size 16] [--steps 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

Ways = dict[str, Callable[[Any], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--data", default="limbeck/demo-train")
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options)
    print(json.dumps(found) if options.json else table(found))


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of every way: tokens as a share of the positions computed, seconds of a step, and their ratio to the first way's (medians)."""
    import torch

    from limbeck import optim
    from limbeck.batch import Signal
    from limbeck.distributed import World
    from limbeck.models import load_tokenizer
    from limbeck.recipe import parse_recipe
    from limbeck.step import optimizer_step
    from limbeck.student import build
    from limbeck.trainer import assemble

    torch.set_num_threads(options.threads)
    recipe = parse_recipe(
        {
            "student": {"model": options.model, "num_layers": options.layers},
            "source": {"type": "dataset", "data": options.data, "max_length": options.max_length, "limit": options.limit},
            "objective": [{"type": "ce"}],
            "train": {"steps": options.steps, "batch_size": options.batch_size, "micro_batch_size": 4},
        }
    )
    student_spec, spec = recipe.for_training()
    tokenizer = load_tokenizer(student_spec.model)
    source = recipe.source.open(tokenizer, recipe.seed)
    learner, _, _ = assemble(recipe, build(student_spec), tokenizer, source, World())
    optimizer = optim.build(spec.optimizer, learner.train())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    ways = ways_of(options.max_length)
    shares: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(options.steps):
        samples, losses = source.at(step, options.batch_size), {}
        for name, lay_out in ways.items():
            batches = lay_out(samples)
            shares[name].append(sum(batch.num_tokens for batch in batches) / sum(batch.input_ids.numel() for batch in batches))
            start = time.process_time()
            losses[name] = optimizer_step(learner, recipe.terms, batches, lambda batch: Signal(), optimizer, spec, World()).loss
            seconds[name].append(time.process_time() - start)
        first = next(iter(losses.values()))
        assert all(abs(loss - first) < 1e-5 * first for loss in losses.values()), losses
    base = seconds[next(iter(ways))]
    return {
        name: {
            "share_not_padding": statistics.mean(shares[name]),
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(mine / theirs for mine, theirs in zip(seconds[name], base, strict=True)),
        }
        for name in ways
    }


def ways_of(max_length: int) -> Ways:
    """Layouts of a step by name; all but the first are what `microbatches` makes of train.micro_batch_size and train.pack_length."""
    from limbeck.sources.base import microbatches
    from limbeck.tokens.pad import pad

    return {
        "order of the step, 4 rows": lambda samples: [pad(samples[i : i + 4], 0) for i in range(0, len(samples), 4)],
        "by length, 4 rows": lambda samples: microbatches(samples, 4, 0, 1, 0),
        f"packed to {max_length}, 4 rows": lambda samples: microbatches(samples, 4, 0, 1, 0, max_length),
        f"packed to {2 * max_length}, 2 rows": lambda samples: microbatches(samples, 2, 0, 1, 0, 2 * max_length),
        f"packed to {4 * max_length}, 1 row": lambda samples: microbatches(samples, 1, 0, 1, 0, 4 * max_length),
    }


def table(found: dict[str, dict[str, float]]) -> str:
    lines = ["| microbatches | not padding | CPU seconds per step | ratio |", "|---|---|---|---|"]
    lines += [f"| {name} | {row['share_not_padding']:.1%} | {row['seconds']:.2f} | {row['ratio']:.2f} |" for name, row in found.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
