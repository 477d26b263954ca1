"""The output head with its losses, forward and backward: Limbeck against bare matmuls, plain PyTorch, TRL and Liger.

Two effects are kept apart: row selection (unscored rows never reach the head) and fusion (no logits kept for backward). So every
contestant that is not Limbeck runs as it is, on all rows, and again given the scored rows only. Each runs in a process of its own, whose
peak memory above its inputs is read from the system, without the head's own gradient, which all of them need. Its gradient is compared
with the reference on a small problem before it is timed. Processes take turns, so that a noisy machine is noisy for all, and each gives
its median of several calls; a ratio is the median of the ratios within a round.

The floor is the matmuls alone at the fastest of several chunk sizes: student's logits, two gradients and, for a dense teacher, its logits.

    python benchmarks/loss_layer.py [--vocabulary 151936] [--share 0.5] [--tokens 1024] [--rounds 5] [--json]
    python benchmarks/loss_layer.py --grid        # vocabularies 49,152 and 151,936, shares 0.25, 0.5 and 1

TRL (`trl`) and Liger (`liger-kernel`, which needs no Triton here) take part where they are installed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

FLOORS = tuple(f"matmuls_{kind}_{rows}" for kind in ("dense", "sft") for rows in (64, 128, 256, 512))
PEERS = tuple(name for name in ("trl", "liger") if find_spec({"trl": "trl", "liger": "liger_kernel"}[name]))
CONTESTANTS = (
    *FLOORS, "plain_all", "plain_scored", "limbeck_sft", "limbeck_dense", "limbeck_top64",
    "compiled_sft", "compiled_dense", "compiled_top64",
    *(f"{peer}_{rows}" for peer in PEERS for rows in ("all", "scored")),
)  # fmt: skip
WIDTHS = {49_152: (576, 576), 151_936: (896, 1536)}
"""Student's and teacher's width that go with a vocabulary: SmolLM2-135M with itself, Qwen2.5 0.5B with 1.5B."""
CE_WEIGHT, KL_WEIGHT, TOP_K = 0.5, 1.0, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936, choices=WIDTHS)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.5, help="share of the tokens that is scored")
    parser.add_argument("--rounds", type=int, default=5, help="processes per contestant")
    parser.add_argument("--calls", type=int, default=3, help="timed calls per process")
    parser.add_argument("--head-memory-mb", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=CONTESTANTS, help="run these only")
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measure(options)))
        return
    settings = [(v, share) for v in WIDTHS for share in (0.25, 0.5, 1.0)] if options.grid else [(options.vocabulary, options.share)]
    results = []
    for vocabulary, share in settings:
        options.vocabulary, options.share = vocabulary, share
        results.append(compare(options))
        print("\n" + table(results[-1]) + "\n", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(results if options.grid else results[0]["ratios"] | {"details": results[0]}))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds (median and range over rounds, one process each) and memory of every contestant, and the ratios that matter."""
    names = options.only or CONTESTANTS
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, "--contestant", name]
            command += [
                f"--{key.replace('_', '-')}={getattr(options, key)}"
                for key in ("vocabulary", "tokens", "share", "calls", "head_memory_mb", "threads")
            ]
            runs[name].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout))
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
    rows = {
        name: {
            "seconds": statistics.median(run["seconds"] for run in its),
            "seconds_min": min(run["seconds"] for run in its),
            "seconds_max": max(run["seconds"] for run in its),
            "megabytes": statistics.median(run["megabytes"] for run in its),
            "gradient_error": max(run["gradient_error"] for run in its),
        }
        for name, its in runs.items()
    }
    settings = {key: getattr(options, key) for key in ("vocabulary", "tokens", "share", "rounds", "calls", "head_memory_mb", "threads")}
    return {"settings": settings, "contestants": rows, "ratios": ratios(runs)}


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Medians over rounds. The floor is the chunk size that is fastest over all rounds, not in each: that would be luck."""

    def over(above: str, below: str, what: str = "seconds") -> float | None:
        if above not in runs or below not in runs:
            return None
        return statistics.median(mine[what] / theirs[what] for mine, theirs in zip(runs[above], runs[below], strict=True))

    def middle(name: str) -> float:
        return statistics.median(run["seconds"] for run in runs[name])

    floors = {kind: min((name for name in runs if name.startswith(f"matmuls_{kind}")), key=middle, default="") for kind in ("dense", "sft")}
    found = {
        "dense_over_floor": over("limbeck_dense", floors["dense"]),
        "dense_over_plain_scored": over("limbeck_dense", "plain_scored"),
        "memory_over_plain_scored": over("limbeck_dense", "plain_scored", "megabytes"),
        "tail_over_sft": over("limbeck_top64", "limbeck_sft"),
        **{f"compiled_{kind}": over(f"compiled_{kind}", f"limbeck_{kind}") for kind in ("sft", "dense", "top64")},
        "row_selection": over("plain_scored", "plain_all"),
        "sft_over_floor": over("limbeck_sft", floors["sft"]),
        "dense_over_plain_all": over("limbeck_dense", "plain_all"),
        "memory_over_plain_all": over("limbeck_dense", "plain_all", "megabytes"),
    }
    result = {key: value for key, value in found.items() if value is not None}
    for key, rows_given in (("peers_over_ours", "all"), ("peers_scored_over_ours", "scored")):
        result[key] = {peer: over(f"{peer}_{rows_given}", "limbeck_dense") for peer in PEERS if f"{peer}_{rows_given}" in runs}  # type: ignore[assignment]
    return result


def table(result: dict[str, Any]) -> str:
    settings = result["settings"]
    title = "V = {vocabulary:,}, {tokens} tokens of which {share:.0%} scored, {threads} threads".format(**settings)
    lines = [title, "", "| contestant | seconds (median, range) | MB | gradient error |", "|---|---|---|---|"]
    for name, row in result["contestants"].items():
        spread = f"{row['seconds']:.2f} ({row['seconds_min']:.2f} to {row['seconds_max']:.2f})"
        lines.append(f"| {name} | {spread} | {row['megabytes']:.0f} | {row['gradient_error']:.1e} |")
    lines.append("")
    for key, value in result["ratios"].items():
        shown = {name: round(ratio, 2) for name, ratio in value.items()} if isinstance(value, dict) else f"{value:.2f}"
        lines.append(f"{key}: {shown}")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One contestant in this process: check its gradient on a small problem, then time the real one."""
    import torch

    from limbeck.log import peak_memory_mb, reset_peak_memory

    torch.set_num_threads(options.threads)
    run = contestant(options.contestant, options.head_memory_mb)
    error = gradient_error(options.contestant)
    widths = WIDTHS[options.vocabulary]
    problem = make_problem(options.vocabulary, *widths, options.tokens, options.share, with_top=options.contestant.endswith("top64"))
    ctypes.CDLL(None).malloc_trim(0)  # memory that making the inputs left free would hide what the contestant takes
    reset_peak_memory()
    before = peak_memory_mb()
    run({**problem, "weight": problem["weight"].detach()})  # a frozen head: memory without its gradient; and first calls are slow
    megabytes = peak_memory_mb() - before
    seconds = []
    for _ in range(options.calls):
        problem["hidden"].grad = problem["weight"].grad = None
        start = time.perf_counter()
        run(problem)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "megabytes": megabytes, "gradient_error": error}


def make_problem(vocabulary: int, width: int, teacher_width: int, tokens: int, share: float, with_top: bool = True) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    scored = torch.zeros(tokens, dtype=torch.bool)
    scored[: round(tokens * share)] = True
    problem = {
        "hidden": draw(tokens, width).requires_grad_(),
        "weight": (draw(vocabulary, width) * width**-0.5).requires_grad_(),
        "teacher_hidden": draw(tokens, teacher_width),
        "teacher_weight": draw(vocabulary, teacher_width) * 2 * teacher_width**-0.5,
        "targets": torch.randint(vocabulary, (tokens,), generator=generator),
        "scored": scored[torch.randperm(tokens, generator=generator)],
    }
    if not with_top:
        return problem
    with torch.no_grad():
        top, ids, tail = [], [], []
        for rows in problem["teacher_hidden"].split(32):  # in pieces, so that the inputs' own peak stays small
            log_probs = torch.log_softmax(rows @ problem["teacher_weight"].T, -1)
            values, indices = log_probs.topk(TOP_K)
            top, ids = [*top, values], [*ids, indices]
            tail.append(log_probs.scatter_(-1, indices, -torch.inf).logsumexp(-1))
    problem["top"] = (torch.cat(ids), torch.cat(top), torch.cat(tail))
    return problem


def contestant(name: str, head_memory_mb: int) -> Callable[[dict[str, Any]], None]:
    """A function that leaves gradients in the problem's hidden and weight."""
    from limbeck.kernels import CompiledBlock

    kind, _, rows = name.partition("_")
    if kind == "matmuls":
        what, _, chunk = rows.partition("_")
        return lambda problem: matmuls(problem, what, int(chunk))
    if kind in ("limbeck", "compiled"):
        compiled = CompiledBlock(output_terms(rows)) if kind == "compiled" else None
        return lambda problem: limbeck_head(problem, rows, head_memory_mb, compiled)
    loss = {"plain": plain, "trl": trl_jsd, "liger": liger_jsd}[kind]

    def run(problem: dict[str, Any]) -> None:
        keep = problem["scored"]
        if rows == "scored":
            problem = {**problem, **{key: problem[key][keep] for key in ("hidden", "teacher_hidden", "targets")}, "scored": keep[keep]}
        loss(problem)

    return run


def matmuls(problem: dict[str, Any], what: str, chunk_rows: int) -> None:
    import torch

    weight, teacher_weight, scored = problem["weight"].detach(), problem["teacher_weight"], problem["scored"]
    rows, teacher_rows = problem["hidden"].detach()[scored], problem["teacher_hidden"][scored]
    grad_weight, grad_rows = torch.zeros_like(weight), torch.zeros_like(rows)
    logits = torch.empty(min(chunk_rows, len(rows)), len(weight))
    for chunk, ours, theirs in zip(grad_rows.split(chunk_rows), rows.split(chunk_rows), teacher_rows.split(chunk_rows), strict=True):
        buffer = logits[: len(ours)]
        if what == "dense":
            torch.mm(theirs, teacher_weight.T, out=buffer)
        torch.mm(ours, weight.T, out=buffer)
        torch.mm(buffer, weight, out=chunk)
        grad_weight.addmm_(buffer.T, ours)


def plain(problem: dict[str, Any]) -> None:
    import torch
    from torch.nn import functional

    student = (problem["hidden"] @ problem["weight"].T).log_softmax(-1)
    with torch.no_grad():
        teacher = (problem["teacher_hidden"] @ problem["teacher_weight"].T).log_softmax(-1)
    ce = functional.nll_loss(student, problem["targets"], reduction="none")
    kl = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    keep = problem["scored"]
    ((CE_WEIGHT * ce + KL_WEIGHT * kl)[keep].sum() / keep.sum()).backward()


def trl_jsd(problem: dict[str, Any]) -> None:
    """TRL's generalised JSD at beta 0, where it is forward KL; it has no cross-entropy."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    student = (problem["hidden"] @ problem["weight"].T)[None]
    with torch.no_grad():
        teacher = (problem["teacher_hidden"] @ problem["teacher_weight"].T)[None]
    labels = torch.where(problem["scored"], problem["targets"], -100)[None]
    GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=0.0, temperature=1.0).backward()


def liger_jsd(problem: dict[str, Any]) -> None:
    """Liger's fused linear JSD at beta 0 (forward KL) with its hard loss (cross-entropy), not compiled."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=CE_WEIGHT, weight_soft_loss=KL_WEIGHT, beta=0.0, temperature=1.0, compiled=False)
    labels = torch.where(problem["scored"], problem["targets"], -100)
    loss(problem["hidden"], problem["weight"], problem["teacher_hidden"], problem["teacher_weight"], labels).backward()


def output_terms(what: str) -> dict[str, Any]:
    from limbeck.objectives import CrossEntropy, Logits
    from limbeck.objectives.base import active

    return active([CrossEntropy(weight=CE_WEIGHT), *([Logits(weight=KL_WEIGHT)] if what != "sft" else [])])


def limbeck_head(problem: dict[str, Any], what: str, head_memory_mb: int, compiled: Any = None) -> None:
    from limbeck.batch import Signal, TopK
    from limbeck.objectives.head import Head, fused, num_chunks

    keep, terms = problem["scored"], output_terms(what)
    count, vocabulary = int(keep.sum()), len(problem["weight"])
    signal = Signal()
    if what == "dense":
        signal = Signal(output=problem["teacher_hidden"][keep], teacher_head=Head(problem["teacher_weight"]))
    elif what == "top64":
        ids, top, tail = (values[keep] for values in problem["top"])
        signal = Signal(sparse=TopK(ids, top, {1.0: tail}))
    scales = {key: term.weight / count for key, term in terms.items()}
    chunks = num_chunks(count, vocabulary, head_memory_mb)  # from the largest microbatch, as a recipe fixes it
    loss, _ = fused(problem["hidden"][keep], Head(problem["weight"]), problem["targets"][keep], signal, terms, scales, chunks, compiled)
    loss.backward()


def gradient_error(name: str) -> float:
    """Largest difference from a float64 gradient by autograd on a small problem, relative to its largest entry; the floor has none."""
    if name.startswith("matmuls"):
        return 0.0
    import torch

    problem = make_problem(512, 16, 24, 64, 0.5)
    contestant(name, 1)(problem)
    hidden, weight = (problem[key].detach().double().requires_grad_() for key in ("hidden", "weight"))
    log_q = (hidden @ weight.T).log_softmax(-1)
    log_p = (problem["teacher_hidden"].double() @ problem["teacher_weight"].double().T).log_softmax(-1)
    ce = -log_q.gather(-1, problem["targets"][:, None]).squeeze(-1)
    if name.endswith("top64"):
        ids, top, tail = problem["top"]
        student_tail = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
        kl = (top.double().exp() * (top.double() - log_q.gather(-1, ids))).sum(-1) + tail.double().exp() * (tail.double() - student_tail)
    else:
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    weights = (CE_WEIGHT, 0.0) if name.endswith("sft") else (0.0, 1.0) if name.startswith("trl") else (CE_WEIGHT, KL_WEIGHT)
    keep = problem["scored"]
    ((weights[0] * ce + weights[1] * kl)[keep].sum() / keep.sum()).backward()
    return max(
        float((problem[key].grad - exact.grad).abs().max() / exact.grad.abs().max())
        for key, exact in (("hidden", hidden), ("weight", weight))
    )


if __name__ == "__main__":
    main()
