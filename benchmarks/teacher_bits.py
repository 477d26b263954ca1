"""Teachers in 8 and 4 bits against the full one: the memory of their weights, how far their distributions are from its, and their time.

Scored tokens of held-out conversations; KL(full || low) in nats per token, and the share of tokens at which both find the same token
most likely. Seconds are those of the process.

    python benchmarks/teacher_bits.py [--model NAME] [--data limbeck/demo-heldout] [--limit 64] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="limbeck/demo-heldout")
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options)
    print(json.dumps(found) if options.json else table(found))


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of every way to load the teacher: MB of its weights, KL and agreement with the full one, and milliseconds per token."""
    import torch

    from limbeck.models import load_tokenizer
    from limbeck.objectives.base import Needs
    from limbeck.sources import DatasetSource
    from limbeck.teachers import ModelTeacher
    from limbeck.tokens.pad import pad

    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    source = DatasetSource(data=options.data, max_length=options.max_length, limit=options.limit)
    batches = [pad([sample], 0) for sample in source.open(tokenizer, 0).samples]
    full: list[Any] = []
    found = {}
    for name, load_in in (("float32", None), ("8bit", "8bit"), ("4bit", "4bit")):
        scorer = ModelTeacher(model=options.model, load_in=load_in).open(tokenizer, Needs(output=True))
        kls, same, start = [], [], time.process_time()
        signals = [scorer.score(batch) for batch in batches]
        seconds = time.process_time() - start
        full = full or [(scorer.head, signal) for signal in signals]
        for (head, theirs), ours in zip(full, signals, strict=True):
            p, q = head(theirs.output).log_softmax(-1), scorer.head(ours.output).log_softmax(-1)
            kls.append((p.exp() * (p - q)).sum(-1))
            same.append((p.argmax(-1) == q.argmax(-1)).float())
        found[name] = {
            "weights_mb": sum(parameter.nbytes for parameter in scorer.model.parameters()) / 2**20,
            "kl": torch.cat(kls).mean().item(),
            "top1": torch.cat(same).mean().item(),
            "tokens": torch.cat(kls).numel(),
            "ms_per_token": 1000 * seconds / sum(batch.num_tokens for batch in batches),
        }
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    lines = ["| weights in | MB | KL(full, this) | same first token | ms per token |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row['weights_mb']:.0f} | {row['kl']:.3f} | {row['top1']:.1%} | {row['ms_per_token']:.2f} |"
        for name, row in found.items()
    ]
    return "\n".join([*lines, f"{next(iter(found.values()))['tokens']} scored tokens"])


if __name__ == "__main__":
    main()
