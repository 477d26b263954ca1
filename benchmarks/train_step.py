"""A whole training step on the demo's models and data: Limbeck's arms against each other and against TRL's trainers.

A step is forward, backward, clipping and AdamW, with all that stands between two of them: fetching, padding, logging. SmolLM2-135M-Instruct
teaches the demo's student, 14 of its blocks. Limbeck's contestants are the demo's arms as `limbeck.train` runs them: `sft`, `online`
(cross-entropy and forward KL, the teacher runs in every step), `store`, `top64` and `sampled` (the same from captures made beforehand:
exact, the 64 most probable tokens, draws) and `hidden` (from the exact one). TRL takes part where it is installed, as it is released:
`trl_sft` is SFTTrainer, `trl_gkd` the experimental GKDTrainer off-policy (lmbda 0) with forward KL (beta 0).

Every contestant runs in a process of its own, and they take turns, so that a noisy machine is noisy for all. One clock for all: the end
of each `optimizer.step`, told by a hook of torch. Loading and the first step are outside of time and memory; memory is the resident peak
of the process from then on, with everything that it imported.

All train on the same token ids and targets in the same microbatches with the same optimizer, so losses must agree where they are defined
alike; the output says whether they do. TRL gets tokens and labels ready made (its own rendering is not measured), and neither gradient
checkpointing nor bf16, its defaults. What differs: TRL passes a padding mask; its SFTTrainer also computes entropy and accuracy, and its
GKDTrainer no cross-entropy.

What each loss adds to a step is in `loss_steps.py`.

    python benchmarks/train_step.py [--batch-size 8] [--steps 3] [--rounds 5] [--only sft trl_sft] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.recipe import Recipe
    from limbeck.tokens.sample import Sample

ARMS = {"sft": "sft", "online": "logits", "store": "logits", "top64": "logits", "sampled": "logits", "hidden": "hidden"}
"""The demo's arm that a contestant of ours is."""
CODECS = {"exact": "{type: exact}", "top64": "{type: topk, k: 64, prior: false}", "sampled": "{type: sampled}"}
FROM_STORE = {"store": "exact", "top64": "top64", "sampled": "sampled", "hidden": "exact"}
"""The codec of the capture that a contestant trains from."""
CONTESTANTS = (*ARMS, *(("trl_sft", "trl_gkd") if find_spec("trl") and find_spec("datasets") else ()))
CAPTURES = {f"capture_{codec}": codec for codec in CODECS}
RATIOS = {
    "online_over_sft": ("online", "sft"),
    "store_over_sft": ("store", "sft"),
    "top64_over_sft": ("top64", "sft"),
    "sampled_over_sft": ("sampled", "sft"),
    "hidden_over_sft": ("hidden", "sft"),
    "store_over_online": ("store", "online"),
    "trl_sft_over_ours": ("trl_sft", "sft"),
    "trl_gkd_over_online": ("trl_gkd", "online"),
}
"""Of seconds and, as `memory_*`, of memory."""
CHECKS = (
    ("sft", "loss", "trl_sft", "loss", "every step"),
    ("sft", "grad_norm", "trl_sft", "grad_norm", "first step"),
    ("online", "loss/logits", "trl_gkd", "loss", "first step"),  # GKD's weights go another way from there: it has no cross-entropy
    ("online", "loss", "store", "loss", "every step"),
    ("sft", "loss", "hidden", "loss/ce", "first step"),
)
TOLERANCE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="conversations per step")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=CONTESTANTS, help="run these only")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contestant", choices=(*CONTESTANTS, *CAPTURES), help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print("\n" + json.dumps(measure(options)))  # last, whatever a trainer prints
        return
    result = compare(options)
    print("\n" + table(result) + "\n", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(result["ratios"] | {"details": result}))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second and memory of every contestant (medians and ranges over rounds), the ratios, and whether the losses agree."""
    names = options.only or CONTESTANTS
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        options.store = folder
        for name in sorted({f"capture_{FROM_STORE[name]}" for name in names if name in FROM_STORE}):
            in_process(name, options)
        for turn in range(options.rounds):
            for name in names:
                runs[name].append(in_process(name, options))
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
    rows = {}
    for name, its in runs.items():
        speeds = [run["tokens"] / run["seconds"] for run in its]
        rows[name] = {
            "tokens_per_second": statistics.median(speeds),
            "tokens_per_second_min": min(speeds),
            "tokens_per_second_max": max(speeds),
            "seconds_per_step": statistics.median(run["seconds"] for run in its) / options.steps,
            "megabytes": statistics.median(run["megabytes"] for run in its),
            "megabytes_max": max(run["megabytes"] for run in its),
        }
    settings = {key: getattr(options, key) for key in ("batch_size", "micro_batch_size", "steps", "rounds", "threads")}
    tokens = next(iter(runs.values()))[0]["tokens"]
    return {"settings": settings | {"tokens": tokens}, "contestants": rows, "ratios": ratios(runs), "checks": checks(runs)}


def in_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `measure` gives in a process of its own."""
    command = [sys.executable, __file__, "--contestant", name]
    command += [
        f"--{key.replace('_', '-')}={getattr(options, key)}" for key in ("batch_size", "micro_batch_size", "steps", "threads", "store")
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Medians of the ratios within a round."""
    found = {}
    for prefix, what in (("", "seconds"), ("memory_", "megabytes")):
        for key, (above, below) in RATIOS.items():
            if above in runs and below in runs:
                pairs = zip(runs[above], runs[below], strict=True)
                found[prefix + key] = statistics.median(mine[what] / theirs[what] for mine, theirs in pairs)
    return found


def checks(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Whether contestants did the same job: the largest relative difference of what their trainers logged."""
    found = []
    for name, key, other, other_key, when in CHECKS:
        if name not in runs or other not in runs:
            continue
        mine, theirs = runs[name][0]["log"], runs[other][0]["log"]
        steps = range(len(mine) if when == "every step" else 1)
        difference = max(abs(mine[step][key] - theirs[step][other_key]) / abs(mine[step][key]) for step in steps)
        what = f"{key} of {name} ({mine[0][key]:.6f}) = {other_key} of {other}, {when}"
        found.append({"what": what, "difference": difference, "agrees": difference < TOLERANCE})
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        "{steps} steps of {batch_size} conversations ({tokens} tokens), {micro_batch_size} at a time, {threads} threads".format(
            **result["settings"]
        ),
        "",
        "| contestant | tokens per second (median, range) | seconds per step | peak memory, MB |",
        "|---|---|---|---|",
    ]
    for name, row in result["contestants"].items():
        speed = "{tokens_per_second:.0f} ({tokens_per_second_min:.0f} to {tokens_per_second_max:.0f})".format(**row)
        lines.append(f"| {name} | {speed} | {row['seconds_per_step']:.2f} | {row['megabytes']:,.0f} |")
    lines += ["", *(f"{key}: {value:.2f}" for key, value in result["ratios"].items()), ""]
    lines += [f"{'agrees' if check['agrees'] else 'DIFFERS'} ({check['difference']:.0e}): {check['what']}" for check in result["checks"]]
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One contestant in this process: seconds and tokens of the timed steps, peak memory, and what its trainer logged for every step."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from limbeck.log import peak_memory_mb, reset_peak_memory

    torch.set_num_threads(options.threads)
    recipe = recipe_of(options)
    if options.contestant in CAPTURES:
        import limbeck

        limbeck.capture(recipe)
        return {}
    steps = steps_of(recipe, options)
    ends: list[float] = []

    def at_end(*_: Any) -> None:
        if not ends:
            reset_peak_memory()
        ends.append(time.perf_counter())
        if len(ends) > options.steps:
            memory.append(peak_memory_mb())  # what a trainer does after its last step is no part of a step

    memory: list[float] = []
    register_optimizer_step_post_hook(at_end)
    with tempfile.TemporaryDirectory() as folder:
        log = train_limbeck(recipe, folder) if options.contestant in ARMS else train_trl(options, recipe, steps, folder)
    assert len(ends) == len(log) == options.steps + 1, (len(ends), len(log))
    tokens = sum(len(sample.ids) for samples in steps[1:] for sample in samples)
    return {"seconds": ends[-1] - ends[0], "tokens": tokens, "megabytes": memory[0], "log": log}


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The demo's recipe for a contestant; the peers have that of SFT, for student, data and optimizer."""
    from limbeck.demo import STUDY
    from limbeck.recipe import parse_recipe
    from limbeck.study import load_study

    name, num_steps = options.contestant, options.steps + 1
    changes = [
        "evaluate=[]",
        f"source.limit={num_steps * options.batch_size}",
        f"train.steps={num_steps}",
        f"train.batch_size={options.batch_size}",
        f"train.micro_batch_size={options.micro_batch_size}",
        "train.optimizer.schedule=constant",
        "train.optimizer.warmup_fraction=0",
    ]
    if name in FROM_STORE:
        changes.append(f"teacher={{type: store, path: {Path(options.store, FROM_STORE[name])}}}")
    if name in CAPTURES:
        changes += [f"capture.path={Path(options.store, CAPTURES[name])}", f"capture.codec={CODECS[CAPTURES[name]]}"]
    arm = "hidden" if name in CAPTURES else ARMS.get(name, "sft")  # the hidden arm says which states are captured
    return parse_recipe(load_study(STUDY).recipes()[arm], changes)


def steps_of(recipe: Recipe, options: argparse.Namespace) -> list[list[Sample]]:
    """The conversations of every step in the order in which Limbeck lays them out, so that all compute on the same microbatches."""
    from limbeck.models import load_tokenizer
    from limbeck.tokens.pack import lay_out

    student, spec = recipe.for_training()
    source = recipe.source.open(load_tokenizer(student.model), recipe.seed)
    return [
        [sample for rows in lay_out(source.at(step, spec.batch_size), spec.micro_batch_size) for row in rows for sample in row]
        for step in range(options.steps + 1)
    ]


def train_limbeck(recipe: Recipe, folder: str) -> list[dict[str, Any]]:
    import limbeck

    return limbeck.train(recipe, Path(folder, "run")).metrics()


def train_trl(options: argparse.Namespace, recipe: Recipe, steps: list[list[Sample]], folder: str) -> list[dict[str, Any]]:
    import numpy as np
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from limbeck.models import load_model, load_tokenizer
    from limbeck.student import build

    student, spec = recipe.for_training()
    samples = [sample for its in steps for sample in its]
    rows = [{"input_ids": sample.ids.tolist(), "labels": np.where(sample.is_target, sample.ids, -100).tolist()} for sample in samples]
    optimizer = spec.optimizer
    settings = {
        "output_dir": folder,
        "max_steps": len(steps),
        "per_device_train_batch_size": spec.micro_batch_size,
        "gradient_accumulation_steps": -(-spec.batch_size // spec.micro_batch_size),
        "train_sampling_strategy": "sequential",
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.epsilon,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "max_length": None,  # cut already
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    tokenizer = load_tokenizer(student.model)
    given = {"model": build(student), "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    if options.contestant == "trl_sft":
        trainer = SFTTrainer(args=SFTConfig(**settings), **given)
    else:
        trainer = GKDTrainer(
            args=GKDConfig(lmbda=0.0, beta=0.0, **settings),
            teacher_model=load_model(student.model),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),  # its own tokenises messages
            **given,
        )
    trainer.train()
    return [row for row in trainer.state.log_history if "grad_norm" in row]


if __name__ == "__main__":
    main()
