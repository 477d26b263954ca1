"""What `limbeck plan` says of a pair that nobody here could load: a student of 8 and a teacher of 70 billion parameters on H100s.

Both have the shapes of Llama 3, with the tokenizer and the data of the demo, and consist of a config.json. Memory is that of one process at
its peak; the wire is what each process sends in a step. Nothing is measured here, and no model is loaded.

    python benchmarks/large.py [--device h100-80g] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

TOKENIZER = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHAPES = {"8b": (4096, 14336, 32, 32), "70b": (8192, 28672, 80, 64)}
"""Width, width of the MLP, blocks, attention heads."""
ROWS: dict[str, tuple[int, list[str]]] = {
    "DDP, 8 processes": (8, ["parallel.strategy=ddp"]),
    "FSDP2, 8 processes": (8, ["parallel.strategy=fsdp2"]),
    "FSDP2, 32 processes": (32, ["parallel.strategy=fsdp2"]),
    "FSDP2, 32 processes, copies in 8": (32, ["parallel.strategy=fsdp2", "parallel.shard_over=8"]),
    "FSDP2, 8 processes, the teacher captured": (8, ["parallel.strategy=fsdp2", "teacher={type: none}", "objective=[{type: ce}]"]),
}
"""The last stands for a student that reads its teacher from a store: nothing of it is in memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100-80g")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of({name: pretend(Path(folder, name), *shape) for name, shape in SHAPES.items()})
        found = {name: planned(recipe, processes, changes, options.device) for name, (processes, changes) in ROWS.items()}
    if options.json:
        print(json.dumps(found))
        return
    print("| | memory of a process, GB | fits | sent by each in a step, GB | seconds a step |\n|---|---|---|---|---|")
    for name, row in found.items():
        print(f"| {name} | {row['gb']:,.0f} | {'yes' if row['fits'] else 'no'} | {row['sent_gb']:,.0f} | {row['seconds']:,.1f} |")


def pretend(folder: Path, width: int, inner: int, layers: int, heads: int) -> str:
    """A model's folder without weights: `limbeck plan` reads none."""
    from transformers import LlamaConfig

    from limbeck.models import load_tokenizer

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    load_tokenizer(TOKENIZER).save_pretrained(folder)
    return str(folder)


def recipe_of(models: dict[str, str]) -> dict[str, Any]:
    return {
        "student": {"model": models["8b"]},
        "teacher": {"type": "model", "model": models["70b"], "dtype": "bfloat16"},
        "source": {"type": "dataset", "data": "limbeck/demo-train", "max_length": 512},
        "objective": [{"type": "ce"}, {"type": "logits"}],
        "train": {
            "steps": 10,
            "batch_size": 256,
            "micro_batch_size": 2,
            "pack_length": 4096,
            "precision": "bfloat16",
            "gradient_checkpointing": True,
        },
    }


def planned(recipe: dict[str, Any], processes: int, changes: list[str], device: str) -> dict[str, Any]:
    from limbeck.plan import plan
    from limbeck.plan.devices import device as named

    found = plan(recipe, changes, device=device, processes=processes, memory_gb=10_000)  # nothing to fit: that would plan again and again
    steps = found["num_steps"]
    return {
        "gb": found["peak"] / 1e9,
        "parts": found["memory"],
        "fits": found["peak"] <= named(device).memory_gb * 1e9,
        "sent_gb": found["wire_bytes"] / steps / 1e9,
        "seconds": found["seconds"] / steps,
    }


if __name__ == "__main__":
    main()
