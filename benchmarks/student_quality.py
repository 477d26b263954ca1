"""What students make of captures: the demo's students trained from several codecs and without a teacher, compared with the teacher itself.

Every arm trains on the same conversations with the same seeds; they differ in the capture alone, and SFT has none. All are measured on
held-out conversations against the exact capture. What a codec keeps is the share of the gain of the exact capture over SFT:
(KL of SFT - KL of the codec) / (KL of SFT - KL of exact), seed by seed. Started again with the same `--out` it goes on.

    python benchmarks/student_quality.py --out FOLDER [--steps 40] [--seeds 3] [--only exact sft ...] [--json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from store_fidelity import CODECS

SFT = "sft"
ARMS = ("exact", SFT, "topk_64", "nucleus_95_prior", "sampled_50", "quantized_64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of captures and runs")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=64, help="conversations that students are measured on")
    parser.add_argument("--only", nargs="*", choices=[SFT, *CODECS], default=ARMS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {arm: [student(arm, seed, options) for seed in range(options.seeds)] for arm in options.only}
    print(table(found, options), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(found | {"kept": {arm: kept(found, arm) for arm in found} if {"exact", SFT} <= found.keys() else {}}))


def base(options: argparse.Namespace) -> dict[str, Any]:
    """The demo's recipe, longer, with more conversations than an epoch and more held out ones."""
    from limbeck.demo import STUDY
    from limbeck.spec import load_yaml

    tree = load_yaml(STUDY)["base"]
    tree["train"]["steps"] = options.steps
    tree["source"]["limit"] = options.steps * tree["train"]["batch_size"]
    tree["evaluate"] = [part | {"limit": options.held_out} for part in tree["evaluate"] if part["type"] in ("agreement", "bits_per_byte")]
    return tree


def captured(codec: str, options: argparse.Namespace) -> Path:
    """The capture of what the recipe trains on and is measured on, made if it is not there."""
    import limbeck

    path = options.out / "captures" / codec
    tree = {key: value for key, value in base(options).items() if key != "train"}
    limbeck.capture(tree | {"capture": {"path": str(path), "codec": CODECS[codec]}})
    return path


def student(arm: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Metrics of a trained student. Its weights are not kept."""
    import limbeck
    from limbeck.evaluate.runner import evaluate_model
    from limbeck.recipe import parse_recipe
    from limbeck.teachers import StoreTeacher

    out = options.out / "runs" / f"{arm}-{seed}"
    done = out / "metrics.json"
    if not done.exists():
        exact = StoreTeacher(path=str(captured("exact", options)))
        tree = base(options) | {"seed": seed, "evaluate": []}
        tree["objective"] = [{"type": "ce", "weight": 0.2}, {"type": "logits", "weight": 1.0}]
        tree["teacher"] = {"type": "store", "path": exact.path if arm == "exact" else "" if arm == SFT else str(captured(arm, options))}
        if arm == SFT:
            tree |= {"objective": [{"type": "ce"}], "teacher": {"type": "none"}}
        run = limbeck.train(tree, out)
        benchmarks = parse_recipe(base(options)).evaluate
        results = evaluate_model(str(run.student), benchmarks, exact, out)
        found = {name: metric.value for result in results for name, metric in result.metrics.items()}
        shutil.rmtree(run.student)
        done.write_text(json.dumps(found))
    metrics: dict[str, float] = json.loads(done.read_text())
    return metrics


def kept(found: dict[str, list[dict[str, float]]], arm: str) -> list[float]:
    """The share of the exact capture's gain over SFT, by seed."""
    runs = zip(found[SFT], found["exact"], found[arm], strict=True)
    return [(sft["kl"] - mine["kl"]) / (sft["kl"] - exact["kl"]) for sft, exact, mine in runs]


def table(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> str:
    def shown(values: list[float], digits: int) -> str:
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = [
        f"{options.seeds} seeds, {options.steps} steps, {options.held_out} held-out conversations; mean ± standard deviation over seeds",
        "",
        "| arm | KL(teacher, student) | same most probable token | bits per byte | share of the exact gain kept |",
        "|---|---|---|---|---|",
    ]
    for arm, runs in found.items():
        share = shown(kept(found, arm), 2) if {"exact", SFT} <= found.keys() else ""
        means = [shown([run[name] for run in runs], 4) for name in ("kl", "top1", "bits_per_byte")]
        lines.append("| " + " | ".join([arm, *means, share]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
