"""What `limbeck plan` predicts beside what the run then takes: the demo's model, fine-tuned, distilled online, and with adapters.

Each run has processes of its own: one predicts (memory from config.json alone, time from a few measured steps), the other trains. Memory is
the resident peak, or on an accelerator what was allocated; time is that of the training steps.

    python benchmarks/plan.py [--steps 4] [--measure 2] [--only sft online lora hidden] [--json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEACHER = {"type": "model", "model": MODEL}
PRUNED = {"model": MODEL, "num_layers": 14}
RUNS: dict[str, dict[str, Any]] = {
    "sft": {"student": PRUNED, "objective": [{"type": "ce"}]},
    "online": {"student": PRUNED, "teacher": TEACHER, "objective": [{"type": "ce"}, {"type": "logits"}]},
    "lora": {"student": {"model": MODEL, "lora": {}}, "objective": [{"type": "ce"}]},
    "hidden": {"student": PRUNED, "teacher": TEACHER, "objective": [{"type": "ce"}, {"type": "hidden"}]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--measure", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=["sft", "online", "lora"])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            rows[name] = compare(name, given.steps, given.measure, Path(folder))
    if given.json:
        print(json.dumps(rows))
        return
    print("| run | peak predicted, MB | measured, MB | ratio | predicted, s | measured, s | ratio |\n|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        memory, seconds = ([row[f"{which}_{what}"] for which in ("predicted", "measured")] for what in ("mb", "seconds"))
        cells = [f"{a:,.0f} | {b:,.0f} | {a / b:.2f}" for a, b in (memory, seconds)]
        print(f"| {name} | {' | '.join(cells)} |")


def compare(name: str, steps: int, measure: int, folder: Path) -> dict[str, float]:
    """Predicted and measured MB and seconds of a run."""
    recipe = {
        **RUNS[name],
        "source": {"type": "dataset", "data": "limbeck/demo-train", "max_length": 512},
        "train": {"steps": steps, "batch_size": 8, "micro_batch_size": 4},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(recipe))
    # memory without weights; time in a process of its own, which loads them
    shape = limbeck("plan", str(file))
    timed = limbeck("plan", str(file), "--measure", str(measure))
    run = limbeck("train", str(file), "--out", str(folder / name))
    found = {
        "predicted_mb": shape["peak"] / 2**20,
        "measured_mb": run["peak_memory_mb"],
        "predicted_seconds": timed["seconds"],
        "measured_seconds": run["train_seconds"],
    }
    print(name, found, file=sys.stderr, flush=True)
    return found


def limbeck(*arguments: str) -> dict[str, Any]:
    """A command's result, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "limbeck", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        sys.exit(f"limbeck {' '.join(arguments)}: exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
