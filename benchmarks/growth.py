"""How a training step grows: seconds and memory by length of the sequences, vocabulary, rows, and number of terms, each alone.

A small Llama of random weights is the student, another of its shape the teacher; half of the tokens are scored. A step is the teacher's
forward, the learner's forward and backward, clipping and AdamW. Every point runs in a process of its own, and all take turns, so that a
noisy machine is noisy for all; one step before those that count is outside of time and memory. Memory is the resident peak, or on an
accelerator what was allocated, with weights and optimizer state.

Terms, in the order in which they are added: cross-entropy, forward KL, hidden states, reverse KL. One term has no teacher. Growth is the
ratio to the first point of its axis: what a part of the step that does not grow keeps it from being proportional.

    python benchmarks/growth.py [--axes length vocabulary] [--steps 3] [--rounds 3] [--largest 1024] [--plot growth.svg] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TERMS: list[dict[str, Any]] = [
    {"type": "ce"},
    {"type": "logits", "divergence": "forward_kl"},
    {"type": "hidden"},
    {"type": "logits", "divergence": "reverse_kl"},
]
BASE = {"length": 512, "vocabulary": 32_768, "rows": 1, "terms": 2}
AXES: dict[str, tuple[int, ...]] = {
    "length": (128, 256, 512, 1024, 2048, 4096),
    "vocabulary": (32_768, 65_536, 131_072, 262_144),
    "rows": (1, 2, 4, 8),
    "terms": (1, 2, 3, 4),
}
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--steps", type=int, default=3, help="steps that count, after one that does not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--largest", type=int, help="leave out points beyond this on the axes length and vocabulary: a smaller run")
    parser.add_argument("--plot", type=Path, help="draw it, as SVG")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(measure(given.point, given.steps, given.threads)))
        return
    result = {"base": BASE, "shape": SHAPE, "steps": given.steps, "rounds": given.rounds, "threads": given.threads, "axes": compare(given)}
    if given.plot:
        given.plot.write_text(draw(result["axes"]))
    print("\n" + table(result), file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps(result))


def compare(given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Medians over rounds at every point of every axis."""
    points = {
        axis: [value for value in AXES[axis] if axis in ("rows", "terms") or value <= (given.largest or value)] for axis in given.axes
    }
    unlike = {json.dumps({**BASE, axis: value}) for axis, values in points.items() for value in values}
    runs: dict[str, list[dict[str, float]]] = {point: [] for point in sorted(unlike)}
    for turn in range(given.rounds):
        for point, its in runs.items():
            its.append(in_process(point, given))
        print(f"round {turn + 1} of {given.rounds}", file=sys.stderr, flush=True)
    rows: dict[str, list[dict[str, float]]] = {}
    for axis, values in points.items():
        for value in values:
            its = runs[json.dumps({**BASE, axis: value})]
            seconds = [run["seconds"] for run in its]
            row = {"value": value, "seconds": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds)}
            rows.setdefault(axis, []).append(row | {"megabytes": statistics.median(run["megabytes"] for run in its)})
    return rows


def in_process(point: str, given: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--point", point, "--steps", str(given.steps), "--threads", str(given.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{point} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(point: dict[str, int], num_steps: int, threads: int) -> dict[str, float]:
    """Seconds of a step, the median, and the peak of memory, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from limbeck import optim
    from limbeck.batch import Batch, Signal
    from limbeck.distributed import world
    from limbeck.learner import Learner
    from limbeck.log import peak_memory_mb, reset_peak_memory
    from limbeck.models import head
    from limbeck.objectives.base import needs_of
    from limbeck.objectives.head import num_chunks
    from limbeck.recipe import parse_recipe
    from limbeck.step import optimizer_step
    from limbeck.teachers.model import ModelScorer

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    length, vocabulary, rows = point["length"], point["vocabulary"], point["rows"]
    # the recipe for its terms and its settings: model and data are made here
    recipe = parse_recipe(
        {
            "student": {"model": "random/student"},
            "teacher": {"type": "model", "model": "random/teacher"},
            "source": {"type": "dataset", "data": "limbeck/demo-train"},
            "objective": TERMS[: point["terms"]],
            "train": {"steps": 1},
        }
    )
    _, spec = recipe.for_training()
    terms, layers = recipe.terms, SHAPE["num_hidden_layers"]
    with world() as here:
        config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=length, tie_word_embeddings=True, **SHAPE)
        student, needs, scorer = LlamaForCausalLM(config).to(here.device), needs_of(terms, layers, layers), None
        if needs.anything:
            teacher = LlamaForCausalLM(config).to(here.device).requires_grad_(False).eval()
            scorer = ModelScorer("random", teacher, head(teacher), layers, needs)
        num_scored = rows * length // 2
        chunks = num_chunks(num_scored, vocabulary, spec.head_memory_mb)
        learner = Learner(student, terms, vocabulary, layers, SHAPE["hidden_size"], chunks).to(here.device).train()
        optimizer = optim.build(spec.optimizer, learner)
        ids = torch.randint(vocabulary, (rows, length))
        offsets, numbers = torch.arange(length).expand(rows, length), torch.arange(rows)[:, None].expand(rows, length)
        scored = (numbers * length + offsets)[:, length // 2 - 1 : -1].flatten()
        batch = Batch(ids, offsets, numbers, numbers, offsets, scored, ids.flatten()[scored + 1], torch.arange(rows * length))
        score = scorer.score if scorer is not None else lambda batch: Signal()
        seconds = []
        for step in range(num_steps + 1):
            if step == 1:
                reset_peak_memory()
            start = time.perf_counter()
            optimizer_step(learner, {key: term.at(0, 1) for key, term in terms.items()}, [batch], score, optimizer, spec, here)
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "megabytes": peak_memory_mb()}


def table(result: dict[str, Any]) -> str:
    base = ", ".join(f"{axis} {value:,}" for axis, value in result["base"].items())
    lines = [
        f"Where an axis does not say otherwise: {base}. {result['threads']} threads, {result['rounds']} rounds of {result['steps']} steps."
    ]
    for axis, rows in result["axes"].items():
        lines += ["", f"| {axis} | seconds a step (range) | growth | peak memory, MB | growth |", "|---|---|---|---|---|"]
        first = rows[0]
        for row in rows:
            spread = f"{row['seconds']:.3g} ({row['seconds_min']:.3g} to {row['seconds_max']:.3g})"
            growth = [row[what] / first[what] for what in ("seconds", "megabytes")]
            lines.append(f"| {row['value']:,} | {spread} | {growth[0]:.2f} | {row['megabytes']:,.0f} | {growth[1]:.2f} |")
    return "\n".join(lines)


def draw(axes: dict[str, list[dict[str, float]]]) -> str:
    """Seconds and memory over each axis, from zero and in proportion: a straight line is linear growth."""
    import io

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "limbeck", "font.size": 8.5}):
        figure = Figure(figsize=(2.6 * len(axes), 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(2, len(axes), squeeze=False)
        for column, (axis, rows) in enumerate(axes.items()):
            for row, (what, label) in enumerate((("seconds", "seconds a step"), ("megabytes", "peak memory, MB"))):
                panel = panels[row][column]
                values = [point["value"] for point in rows]
                panel.plot(values, [point[what] for point in rows], marker="o", markersize=3)
                if what == "seconds":
                    panel.fill_between(values, [p["seconds_min"] for p in rows], [p["seconds_max"] for p in rows], alpha=0.2, linewidth=0)
                panel.set(xlim=(0, None), ylim=(0, None), xlabel=axis, ylabel=label if column == 0 else "")
                panel.set_xticks(values[-3:], [f"{value:,}" for value in values[-3:]])
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


if __name__ == "__main__":
    main()
