"""One process against two: seconds and memory of a training step, seconds and size of a checkpoint, seconds to load it again.

The demo's logits arm (SmolLM2-135M-Instruct teaches 14 of its own blocks, and runs in every step) is trained by `single` (one process),
`ddp` and `fsdp2` (two or more, started by torchrun), and `fsdp2_whole_teacher`, in which only the student is divided. All get the same
threads in total, so on one machine two processes are no faster than one: what is measured is what dividing costs there, and what it saves.

Contestants take turns, each in new processes. One clock for all: the end of each `optimizer.step`. Loading and the first step are outside
of time and memory; memory is the resident peak of a process from then on, the largest and the sum over processes. A checkpoint is written
after the last step, and then loaded, with its checksums compared, by a run that goes on. Losses must agree; the output says whether so.

    python benchmarks/processes.py [--processes 2] [--steps 3] [--rounds 3] [--only single fsdp2] [--json]
    python benchmarks/processes.py --recipe my.yaml      # another recipe, such as one of tiny models

What `limbeck plan` predicts of a process's memory stands beside what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from limbeck.recipe import Recipe

CONTESTANTS = {
    "single": ["parallel.strategy=single"],
    "ddp": ["parallel.strategy=ddp"],
    "fsdp2": ["parallel.strategy=fsdp2"],
    "fsdp2_whole_teacher": ["parallel.strategy=fsdp2", "parallel.shard_teacher=false"],
}
"""Overrides of the recipe; all but the first run in several processes."""
WHAT = ("seconds", "megabytes", "megabytes_in_all", "checkpoint_seconds", "checkpoint_megabytes", "load_seconds")
PASSED_ON = ("steps", "batch_size", "micro_batch_size", "recipe")
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="conversations per step, over all processes")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="in all, divided among processes")
    parser.add_argument("--only", nargs="*", choices=list(CONTESTANTS), help="run these only")
    parser.add_argument("--recipe", default="", help="train this and not the demo's logits arm")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        measure(options)
        return
    result = compare(options)
    print("\n" + table(result) + "\n", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(result["ratios"] | {"details": result}))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds of what every contestant took, medians of the ratios within a round, and whether the losses agree."""
    names = options.only or list(CONTESTANTS)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names:
            runs[name].append(in_processes(name, options))
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
    rows = {name: {what: statistics.median(run[what] for run in its) for what in WHAT} for name, its in runs.items()}
    for name in names:
        rows[name]["planned_megabytes"] = planned(name, options)
    found = {}
    for above in names[1:]:
        for what in WHAT:
            pairs = zip(runs[above], runs[names[0]], strict=True)
            found[f"{what}_{above}_over_{names[0]}"] = statistics.median(mine[what] / theirs[what] for mine, theirs in pairs)
    losses = {name: its[0]["losses"] for name, its in runs.items()}
    first = losses[names[0]]
    apart = {name: max(abs(a - b) / abs(b) for a, b in zip(its, first, strict=True)) for name, its in losses.items()}
    settings = {key: getattr(options, key) for key in ("processes", "batch_size", "micro_batch_size", "steps", "rounds", "threads")}
    return {"settings": settings, "contestants": rows, "ratios": found, "losses_apart": apart}


def in_processes(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `measure` finds in new processes."""
    count = 1 if name == "single" else options.processes
    with tempfile.TemporaryDirectory() as folder:
        given = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in PASSED_ON]
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        command = [sys.executable, *(launcher if count > 1 else []), __file__, "--contestant", name, "--folder", folder, *given]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(options.threads // count, 1)), "LIMBECK_LOG": "quiet"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr}")
        return dict(json.loads(Path(folder, "found.json").read_text()))


def planned(name: str, options: argparse.Namespace) -> float:
    """What `limbeck plan` says that a process will hold."""
    from limbeck.plan import plan

    options.contestant = name
    return float(plan(recipe_of(options), processes=1 if name == "single" else options.processes)["peak"]) / 2**20


def measure(options: argparse.Namespace) -> None:
    """One process of a contestant: train, go on from the checkpoint, and leave what was found in the folder."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import limbeck
    from limbeck import checkpoint, distributed
    from limbeck.log import peak_memory_mb, reset_peak_memory

    recipe, path = recipe_of(options), Path(options.folder, "run")
    ends: list[float] = []
    memory: list[float] = []
    took: dict[str, float] = {}

    def at_end(*_: Any) -> None:
        if not ends:
            reset_peak_memory()
        ends.append(time.perf_counter())
        if len(ends) > options.steps:
            memory.append(peak_memory_mb())

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = function(*args, **kwargs)
            took[name] = time.perf_counter() - start
            return found

        return call

    checkpoint.save, checkpoint.load_latest = timed("save", checkpoint.save), timed("load", checkpoint.load_latest)
    hook = register_optimizer_step_post_hook(at_end)
    with distributed.world() as world:
        run = limbeck.train(recipe, path)
        hook.remove()
        saved = took["save"]
        distributed.barrier(world)
        sizes = [file.stat().st_size for file in run.checkpoints.glob("step-*/*")]
        if world.is_main:
            (path / "run.json").unlink()  # else there is nothing to go on with
        distributed.barrier(world)
        limbeck.train(recipe, path)
        everyones = distributed.of_all(memory[0], world)
        if world.is_main:
            found = {
                "seconds": (ends[-1] - ends[0]) / options.steps,
                "megabytes": max(everyones),
                "megabytes_in_all": sum(everyones),
                "checkpoint_seconds": saved,
                "checkpoint_megabytes": sum(sizes) / 2**20,
                "load_seconds": took["load"],
                "losses": [row["loss"] for row in run.metrics()],
            }
            Path(options.folder, "found.json").write_text(json.dumps(found))


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe of a contestant: its checkpoint is that of the last step."""
    from limbeck.demo import STUDY
    from limbeck.recipe import load_recipe, parse_recipe
    from limbeck.study import load_study

    num_steps = options.steps + 1
    changes = [
        "evaluate=[]",
        f"train.steps={num_steps}",
        "train.epochs=null",
        f"train.batch_size={options.batch_size}",
        f"train.micro_batch_size={options.micro_batch_size}",
        f"train.checkpoint_every={num_steps}",
        "train.keep_checkpoints=1",
        "train.optimizer.schedule=constant",
        "train.optimizer.warmup_fraction=0",
        *CONTESTANTS[options.contestant],
    ]
    base = load_recipe(options.recipe) if options.recipe else load_study(STUDY).recipes()["logits"]
    return parse_recipe(base, changes)


def table(result: dict[str, Any]) -> str:
    settings = result["settings"]
    lines = [
        "{processes} processes against one, {threads} threads in all; {steps} steps of {batch_size} conversations, {micro_batch_size} at a "
        "time".format(**settings),
        "",
        "| contestant | seconds per step | peak memory of a process, MB | by `limbeck plan`, MB | of all processes, MB | checkpoint, s | "
        "checkpoint, MB | load, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["contestants"].items():
        cells = [f"{row['seconds']:.2f}", f"{row['megabytes']:,.0f}", f"{row['planned_megabytes']:,.0f}", f"{row['megabytes_in_all']:,.0f}"]
        cells += [f"{row['checkpoint_seconds']:.2f}", f"{row['checkpoint_megabytes']:,.0f}", f"{row['load_seconds']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"{key}: {value:.2f}" for key, value in result["ratios"].items()), ""]
    for name, apart in result["losses_apart"].items():
        lines.append(f"losses of {name}: {'agree' if apart < TOLERANCE else 'DIFFER'} ({apart:.0e})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
