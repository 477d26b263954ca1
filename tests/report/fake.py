"""A study's directory as a study leaves it, made of invented numbers in a moment: what a report is made from, without torch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "sft": [{"type": "ce", "weight": 1.0}],
    "logits": [{"type": "ce", "weight": 0.5}, {"type": "logits", "weight": 1.0, "divergence": "forward_kl", "temperature": 1.0}],
    "hidden": [{"type": "ce", "weight": 1.0}, {"type": "hidden", "weight": 1.0, "measure": "mse", "pairs": [[0, 0], [13, 29]]}],
}
# benchmark -> metric -> (higher is better, chance, {model: mean})
MODELS = ("teacher", "untrained", "sft", "logits", "hidden")
METRICS: dict[str, dict[str, tuple[bool, float | None, tuple[float, ...]]]] = {
    "agreement": {"kl": (False, None, (0.0, 7.1, 2.6, 1.4, 2.5)), "top1": (True, None, (1.0, 0.02, 0.37, 0.54, 0.37))},
    "bits_per_byte": {"bits_per_byte": (False, None, (0.6, 4.1, 1.5, 1.3, 1.4))},
    "piqa": {"accuracy": (True, 0.5, (0.65, 0.5, 0.53, 0.55, 0.52))},
}


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def recipe(arm: str, evaluate: list[str] | None = None) -> dict[str, Any]:
    return {
        "student": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "keep_layers": [0, 1, 29]},
        "teacher": {"type": "model", "model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        "source": {"type": "dataset", "data": "limbeck/demo-train", "max_length": 192},
        "objective": OBJECTIVES[arm],
        "train": {"steps": 24, "batch_size": 8, "optimizer": {"learning_rate": 3e-4}},
        "evaluate": [{"type": name, "name": ""} for name in evaluate or METRICS],
    }


def result(benchmark: str, model: str, seed: int = 0, num_items: int = 48) -> dict[str, Any]:
    """A benchmark's result file. Items are hard or easy for all models alike."""
    items = [{"id": f"{benchmark}-{i}", "sums": {}, "counts": {}, "detail": {}} for i in range(num_items)]
    metrics = {}
    for metric, (up, chance, means) in METRICS[benchmark].items():
        mean = means[MODELS.index(model)]
        hard, own = random.Random(f"{benchmark}{metric}"), random.Random(f"{benchmark}{metric}{model}{seed}")
        for item in items:
            count = 1.0 if chance is not None else float(hard.randint(20, 60))
            if chance is not None:
                total = float(hard.random() * 0.8 + own.random() * 0.2 < mean)
            else:
                total = count * max(mean * (1 + 0.4 * hard.gauss(0, 1) + 0.05 * own.gauss(0, 1)), 0.0)
            item["sums"][metric], item["counts"][metric] = total, count
        total, count = sum(i["sums"][metric] for i in items), sum(i["counts"][metric] for i in items)
        squares = sum((i["sums"][metric] - total / count * i["counts"][metric]) ** 2 for i in items)
        metrics[metric] = {
            "value": total / count,
            "stderr": (squares * num_items / (num_items - 1)) ** 0.5 / count,
            "num_items": num_items,
            "higher_is_better": up,
            "chance": chance,
        }
    return {"name": benchmark, "version": 1, "settings": {}, "metrics": metrics, "items": items, "seconds": 3.2}


def run(path: Path, arm: str, seed: int = 0, finished: bool = True, **data: Any) -> Path:
    """A run's directory; `data` replaces values of data.json."""
    write_json(path / "recipe.json", recipe(arm) | {"seed": seed})
    write_json(path / "environment.json", {"python": "3.11.7", "packages": {"torch": "2.13.0"}, "platform": "Linux", "num_cpus": 2})
    hashes = {"initial_weights_sha256": "a" * 64, "data_sha256": "b" * 64, "order_sha256": f"{seed}" * 64, "num_steps": 24}
    write_json(path / "data.json", {"num_tokens": 38_000, **hashes, **data})
    noise = random.Random(f"{arm}{seed}")
    rows = []
    for step in range(1, 25):
        ce = 1.6 + 8.4 * 0.8**step + noise.gauss(0, 0.05)
        row = {"step": step, "loss": ce, "loss/ce": ce, "tokens": 390 * step, "scored_tokens": 210, "seconds": 2.0 * step}
        if arm == "logits":
            row |= {"loss/logits": ce * 0.7, "loss": 0.5 * ce + 0.7 * ce}
        if arm == "hidden":
            row |= {"loss/hidden": 0.8 * 0.97**step, "loss": ce + 0.8 * 0.97**step}
        if arm != "sft":
            row["teacher_nll"] = 0.62 + noise.gauss(0, 0.03)
        rows.append(json.dumps(row))
    (path / "metrics.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    totals = {
        "steps": 24,
        "tokens": 9_360,
        "train_seconds": 48.0,
        "tokens_per_second": 195.0,
        "teacher_share": 0.02,
        "peak_memory_mb": 2900.0,
    }
    write_json(path / "run.json", {"status": "finished", **totals} if finished else {"status": "running"})
    if finished:
        for benchmark in METRICS:
            write_json(path / "evals" / f"{benchmark}.json", result(benchmark, arm, seed))
    return path


def study(path: Path, seeds: tuple[int, ...] = (0,), arms: tuple[str, ...] = ("sft", "logits", "hidden"), **texts: str) -> Path:
    """A finished study's directory."""
    about = {"name": "Demo", "question": "Is it better to distil or to fine-tune, and by which signal?"} | texts
    write_json(
        path / "study.json",
        {
            "format": "limbeck-study",
            "version": 1,
            **about,
            "seeds": list(seeds),
            "references": True,
            "recipes": {a: recipe(a) for a in arms},
        },
    )
    write_json(path / "capture.json", {"seconds": 25.1, "num_samples": 288, "num_scored": 21_000, "num_bytes": 480_000_000})
    for arm in arms:
        for seed in seeds:
            run(path / "arms" / arm / f"seed-{seed}", arm, seed)
    for reference in ("teacher", "untrained"):
        for benchmark in METRICS:
            write_json(path / "references" / reference / "evals" / f"{benchmark}.json", result(benchmark, reference))
    return path
