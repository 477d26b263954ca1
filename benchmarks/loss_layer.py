"""The output head with CE + forward KL, forward and backward: Limbeck's chunked head against plain PyTorch.

Two effects are kept apart: row selection (unscored rows never reach the head) and fusion (no logits kept for backward). So plain
PyTorch runs twice, on all rows and on the scored rows only. Each contestant runs in its own process (memory is its peak above the
inputs, measured from outside of torch), its gradient is compared with the reference before it is timed, and the processes take
turns, so that a noisy machine is noisy for all.

    python benchmarks/loss_layer.py [--vocabulary 49152] [--width 576] [--tokens 1024] [--share 0.5] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

CONTESTANTS = ("matmuls", "plain_all_rows", "plain_scored_rows", "limbeck")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.5, help="share of the tokens that is scored")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk-rows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measure(options)))
        return
    print(json.dumps(compare(options)) if options.json else "\n" + table(compare(options)))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds (median and range over rounds, one process each) and peak memory of every contestant, and their ratios."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for turn in range(options.rounds):
        for name in CONTESTANTS:
            command = [sys.executable, __file__, "--contestant", name]
            command += [
                f"--{key.replace('_', '-')}={getattr(options, key)}"
                for key in ("vocabulary", "width", "tokens", "share", "chunk_rows", "threads")
            ]
            results[name].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
    rows = {}
    for name, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        rows[name] = {
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "megabytes": statistics.median(run["megabytes"] for run in runs),
            "gradient_error": max(run["gradient_error"] for run in runs),
        }
    ours, floor, scored, everything = (rows[name] for name in ("limbeck", "matmuls", "plain_scored_rows", "plain_all_rows"))
    return {
        "settings": {key: value for key, value in vars(options).items() if key not in ("json", "contestant")},
        "contestants": rows,
        "over_floor": ours["seconds"] / floor["seconds"],
        "over_plain_scored_rows": ours["seconds"] / scored["seconds"],
        "over_plain_all_rows": ours["seconds"] / everything["seconds"],
        "memory_over_plain_scored_rows": ours["megabytes"] / scored["megabytes"],
        "memory_over_plain_all_rows": ours["megabytes"] / everything["megabytes"],
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| contestant | seconds (median, range) | MB above the inputs | gradient error |", "|---|---|---|---|"]
    for name, row in result["contestants"].items():
        spread = f"{row['seconds']:.2f} ({row['seconds_min']:.2f} to {row['seconds_max']:.2f})"
        lines.append(f"| {name} | {spread} | {row['megabytes']:.0f} | {row['gradient_error']:.1e} |")
    lines += ["", *(f"{key}: {value:.2f}" for key, value in result.items() if isinstance(value, float))]
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One contestant in this process: check its gradient on a small problem, then time the real one."""
    import torch

    torch.set_num_threads(options.threads)
    error = gradient_error(options.contestant)
    problem = make_problem(options.vocabulary, options.width, options.tokens, options.share)
    run(options.contestant, make_problem(64, 8, 16, 0.5), 4)  # loads what a first call loads
    before = peak_megabytes()
    run(options.contestant, problem, options.chunk_rows)  # the first call also pays for fresh memory
    megabytes = peak_megabytes() - before
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run(options.contestant, problem, options.chunk_rows)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "megabytes": megabytes, "gradient_error": error}


def make_problem(vocabulary: int, width: int, tokens: int, share: float) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
    teacher_weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
    scored = torch.zeros(tokens, dtype=torch.bool)
    scored[: round(tokens * share)] = True
    return {
        "hidden": torch.randn(tokens, width, generator=generator).requires_grad_(),
        "weight": weight.requires_grad_(),
        "teacher_hidden": torch.randn(tokens, width, generator=generator),
        "teacher_weight": teacher_weight,
        "targets": torch.randint(vocabulary, (tokens,), generator=generator),
        "scored": scored[torch.randperm(tokens, generator=generator)],
    }


def run(contestant: str, problem: dict[str, Any], chunk_rows: int) -> None:
    """One forward and backward; the gradients are left in the problem's hidden and weight."""
    for name in ("hidden", "weight"):
        problem[name].grad = None
    {"matmuls": matmuls, "plain_all_rows": plain_all_rows, "plain_scored_rows": plain_scored_rows, "limbeck": limbeck_head}[contestant](
        problem, chunk_rows
    )


def matmuls(problem: dict[str, Any], chunk_rows: int) -> None:
    """The floor: the four head matmuls of a scored token (student's logits, two gradients, teacher's logits), and nothing else."""
    import torch

    weight, teacher_weight, scored = problem["weight"].detach(), problem["teacher_weight"], problem["scored"]
    rows, teacher_rows = problem["hidden"].detach()[scored], problem["teacher_hidden"][scored]
    grad_weight, grad_rows = torch.zeros_like(weight), torch.zeros_like(rows)
    for chunk, ours, theirs in zip(grad_rows.split(chunk_rows), rows.split(chunk_rows), teacher_rows.split(chunk_rows), strict=True):
        logits = ours @ weight.T
        theirs @ teacher_weight.T
        torch.mm(logits, weight, out=chunk)
        grad_weight.addmm_(logits.T, ours)
    problem["hidden"].grad, problem["weight"].grad = torch.zeros_like(problem["hidden"]), grad_weight


def plain(hidden: Any, weight: Any, teacher_hidden: Any, teacher_weight: Any, targets: Any, keep: Any) -> None:
    import torch
    from torch.nn import functional

    student = (hidden @ weight.T).log_softmax(-1)
    with torch.no_grad():
        teacher = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    ce = functional.nll_loss(student, targets, reduction="none")
    kl = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    ((0.5 * ce + kl)[keep].sum() / keep.sum()).backward()


def plain_all_rows(problem: dict[str, Any], chunk_rows: int) -> None:
    plain(*(problem[name] for name in ("hidden", "weight", "teacher_hidden", "teacher_weight", "targets", "scored")))


def plain_scored_rows(problem: dict[str, Any], chunk_rows: int) -> None:
    keep = problem["scored"]
    rows, teacher_rows, targets = (problem[name][keep] for name in ("hidden", "teacher_hidden", "targets"))
    plain(rows, problem["weight"], teacher_rows, problem["teacher_weight"], targets, keep[keep])


def limbeck_head(problem: dict[str, Any], chunk_rows: int) -> None:
    from limbeck.batch import Signal
    from limbeck.objectives import CrossEntropy, Logits
    from limbeck.objectives.base import active
    from limbeck.objectives.head import Head, fused

    keep = problem["scored"]
    terms = active([CrossEntropy(weight=0.5), Logits()])
    count = int(keep.sum())
    signal = Signal(output=problem["teacher_hidden"][keep], teacher_head=Head(problem["teacher_weight"]))
    scales = {key: term.weight / count for key, term in terms.items()}
    loss, _ = fused(
        problem["hidden"][keep], Head(problem["weight"]), problem["targets"][keep], signal, terms, scales, -(-count // chunk_rows)
    )
    loss.backward()


def gradient_error(contestant: str) -> float:
    """Largest difference from the plain gradient on a small problem, relative to its largest entry; the floor has no gradient to check."""
    if contestant == "matmuls":
        return 0.0
    grads = []
    for name in (contestant, "plain_all_rows"):
        problem = make_problem(512, 16, 64, 0.5)
        run(name, problem, 8)
        grads.append([problem["hidden"].grad, problem["weight"].grad])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*grads, strict=True))


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
