"""What a capture costs and saves: capturing against the bare teacher's forward, reading, and a training step from the store against SFT's.

The bare forward makes the logits of every token, as `model(ids).logits` does. Steps of SFT and of logit distillation from the store take
turns on the same conversations, with a learning rate of 0; seconds are those of the process, not of the clock. Memory is the peak of a
process that does nothing else.

    python benchmarks/store_speed.py [--codec '{"type": "exact"}'] [--layers 9 29] [--steps 5] [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS: dict[str, list[dict[str, Any]]] = {"sft": [{"type": "ce"}], "store": [{"type": "ce", "weight": 0.2}, {"type": "logits"}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--student-layers", type=int, default=14)
    parser.add_argument("--data", default="limbeck/demo-train")
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--codec", type=json.loads, default={"type": "exact"})
    parser.add_argument("--layers", type=int, nargs="*", default=[])
    parser.add_argument("--head-memory-mb", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    if options.only:
        print(json.dumps(peak_memory(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.store = f"{folder}/store"
        found = capturing(options) | reading(options) | training(options)
        peaks = {way: json.loads(in_a_process(way, options)) for way in WAYS}
    found |= {"memory_mb": peaks, "memory_ratio": peaks["store"] / peaks["sft"]}
    print(json.dumps(found) if options.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


def recipe_of(options: argparse.Namespace, way: str | None = None) -> Any:
    from limbeck.recipe import parse_recipe

    source = {"type": "dataset", "data": options.data, "max_length": options.max_length, "limit": options.limit}
    if way is None:
        section = {"path": options.store, "codec": options.codec, "layers": options.layers, "samples_per_shard": 16}
        return parse_recipe({"teacher": {"type": "model", "model": options.model}, "source": source, "capture": section})
    train = {"steps": options.steps, "batch_size": 8, "micro_batch_size": 4, "head_memory_mb": options.head_memory_mb}
    teacher = {"type": "store", "path": options.store} if way == "store" else {"type": "none"}
    student = {"model": options.model, "num_layers": options.student_layers}
    return parse_recipe({"student": student, "teacher": teacher, "source": source, "objective": WAYS[way], "train": train})


def capturing(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the bare forward and of a whole capture of the same batches, in turns; loading and calibration apart."""
    import torch

    from limbeck.capture import _Capture
    from limbeck.distributed import World
    from limbeck.store.manifest import read_manifest
    from limbeck.tokens.pad import pad

    capture = _Capture(recipe_of(options), World())
    size = capture.spec.batch_size
    batches = [pad([one.sample for one in capture.wanted[i : i + size]], 0) for i in range(0, len(capture.wanted), size)]
    tokens = sum(batch.num_tokens for batch in batches)

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            capture.scorer.model(input_ids=batch.input_ids, use_cache=False).logits.sum()

    def captured() -> None:
        for file in capture.folder.glob("shard-*"):
            file.unlink()
        plan = capture._plan(manifest)
        capture._write(manifest, plan.todo(manifest))

    capture._begin()
    manifest = read_manifest(capture.folder)
    bare()
    rounds = [(timed(bare), timed(captured)) for _ in range(options.rounds)]
    ratios = [ours / theirs for ours, theirs in rounds]
    capture.run()
    return {
        "bare_tokens_per_second": tokens / statistics.median(ours for ours, _ in rounds),
        "capture_tokens_per_second": tokens / statistics.median(theirs for _, theirs in rounds),
        "capture_speed_ratio": statistics.median(ratios),
        "capture_speed_ratio_range": [min(ratios), max(ratios)],
        "bytes_per_scored_token": read_manifest(capture.folder).num_bytes / read_manifest(capture.folder).num_scored,
    }


def timed(function: Callable[[], None]) -> float:
    """Seconds of the clock: a thread that writes is to hide behind the teacher."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of one reader, batches of 4 in the order of training, nothing read ahead."""
    _, batches, scorer = assembled(options, "store")
    many = batches(0) + batches(1) + batches(2)
    tokens = sum(batch.num_tokens for batch in many)

    def read() -> None:
        for batch in many:
            scorer.score(batch)

    return {"reader_tokens_per_second": tokens / statistics.median(timed(read) for _ in range(options.rounds))}


def training(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of an optimizer step, and their ratio, medians over steps that take turns."""
    ways = {way: assembled(options, way) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(options.steps + 1):
        for way, (run, batches, scorer) in ways.items():
            microbatches = batches(step)
            if scorer is not None:
                scorer.expect(microbatches)
            start = time.process_time()
            run(microbatches)
            seconds[way].append(time.process_time() - start)
    seconds = {way: values[1:] for way, values in seconds.items()}  # the first step allocates
    ratios = [mine / theirs for mine, theirs in zip(seconds["store"], seconds["sft"], strict=True)]
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return {"step_seconds": medians, "step_ratio": statistics.median(ratios), "step_ratio_range": [min(ratios), max(ratios)]}


def assembled(options: argparse.Namespace, way: str) -> tuple[Any, Any, Any]:
    """A function that runs a step, one that gives its microbatches, and the opened teacher."""
    from limbeck import optim
    from limbeck.batch import Signal
    from limbeck.distributed import World
    from limbeck.models import load_tokenizer
    from limbeck.sources.base import microbatches
    from limbeck.step import optimizer_step
    from limbeck.student import build
    from limbeck.trainer import assemble

    recipe = recipe_of(options, way)
    student, spec = recipe.for_training()
    tokenizer = load_tokenizer(student.model)
    source = recipe.source.open(tokenizer, recipe.seed)
    learner, scorer, _ = assemble(recipe, build(student), tokenizer, source, World())
    optimizer = optim.build(spec.optimizer, learner.train())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    score = scorer.score if scorer is not None else lambda batch: Signal()
    return (
        lambda batches: optimizer_step(learner, recipe.terms, batches, score, optimizer, spec, World()),
        lambda step: microbatches(source.at(step, spec.batch_size), spec.micro_batch_size, 0, 1, 0),
        scorer,
    )


def peak_memory(options: argparse.Namespace) -> float:
    from limbeck.log import peak_memory_mb, reset_peak_memory

    run, batches, _ = assembled(options, options.only)
    reset_peak_memory()
    for step in range(min(options.steps, 3)):
        run(batches(step))
    return peak_memory_mb()


def in_a_process(way: str, options: argparse.Namespace) -> str:
    command = [sys.executable, str(Path(__file__)), "--only", way, "--store", options.store]
    for name in ("model", "student_layers", "data", "limit", "max_length", "head_memory_mb", "steps", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
