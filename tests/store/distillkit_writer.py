"""Captures as DistillKit writes them, by the description of its format; made `fixtures/distillkit-*`: `python distillkit_writer.py FOLDER`.

It is no copy of DistillKit's code, and knows nothing of our reader.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

CURRENT = {
    "d": 400,
    "k": 16,
    "exact_k": 4,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 5, "num_elements": 6},
        {"scale_dtype": "float32", "element_bits": 1, "num_elements": 3},
    ],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": False,
}
LEGACY = {
    "vocab_size": 400,
    "k": 16,
    "exact_k": 8,
    "polynomial_degree": 3,
    "with_sqrt_term": True,
    "term_dtype": "float32",
    "invert_polynomial": True,
}
_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def raw(values, dtype):
    """The bytes of a row of floats."""
    return torch.tensor(values, dtype=torch.float64).to(_TORCH[dtype]).view(torch.uint8).tolist()


def high_first(numbers, bits):
    """Numbers of so many bits, the highest bit first, filled up to whole bytes at the end."""
    text = "".join(format(int(number), f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def fit(terms, values, dtype):
    """Least squares, and what the rounded fit misses."""
    matrix = np.stack(terms, 1)
    found = torch.tensor(np.linalg.lstsq(matrix, values, rcond=None)[0]).to(_TORCH[dtype]).double().numpy()
    return found, values - matrix @ found


def current_row(ids, values, settings=CURRENT):
    """`compressed_logprobs` and `bytepacked_indices` of one token, from its k log-probabilities in order."""
    values = np.asarray(values, dtype=np.float64)
    if settings["delta_encoding"]:
        values = np.diff(values, prepend=0.0)
    exact, rest = values[: settings["exact_k"]], values[settings["exact_k"] :]
    blob = raw(exact, settings["exact_dtype"])
    if settings["polynomial_terms"]:
        at = np.linspace(0, 1, len(rest)) if settings["normalize_t"] else np.arange(len(rest), dtype=float)
        terms = [{"sqrt": np.sqrt, "exp": np.exp}[term](at) if isinstance(term, str) else at**term for term in settings["polynomial_terms"]]
        found, rest = fit(terms, rest, settings["term_dtype"])
        blob += raw(found, settings["term_dtype"])
    start = 0
    for one in settings["residual_bins"]:
        bits, part = one["element_bits"], rest[start : start + one["num_elements"]]
        scale = float(torch.tensor(max(np.abs(part).max() / (1 if bits == 1 else 2 ** (bits - 1)), 1e-6)).to(_TORCH[one["scale_dtype"]]))
        low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        blob += raw([scale], one["scale_dtype"]) + high_first(np.clip(np.round(part / scale), low, high) - low, bits)
        start += one["num_elements"]
    return blob, high_first(ids, math.ceil(math.log2(settings["d"])))


def legacy_row(ids, values, settings=LEGACY):
    """`packed_indices`, `exact_values` and `coeffs` of one token."""
    bits = math.ceil(math.log2(settings["vocab_size"]))
    per_word = 64 // bits
    words = [sum(int(one) << (bits * i) for i, one in enumerate(ids[at : at + per_word])) for at in range(0, len(ids), per_word)]
    exact, rest = values[: settings["exact_k"]], np.asarray(values[settings["exact_k"] :], dtype=np.float64)
    at = np.arange(1, len(rest) + 1, dtype=float)
    sign = -1 if settings["invert_polynomial"] else 1
    terms = [at ** (sign * power) for power in range(settings["polynomial_degree"] + 1)] + [np.sqrt(at)] * settings["with_sqrt_term"]
    coefficients = fit(terms, rest, settings["term_dtype"])[0] if len(rest) else []
    return words, np.asarray(exact, dtype=np.float16).astype(np.float32).tolist(), np.asarray(coefficients, np.float32).tolist()


def write(folder, documents, settings, rows_per_file=4):
    """`documents` are pairs of token ids and log-probabilities `[len(ids) - 1, V]`; a padding token (id 2) is appended to each document."""
    folder.mkdir(parents=True, exist_ok=True)
    is_legacy = "vocab_size" in settings
    names = ("packed_indices", "exact_values", "coeffs") if is_legacy else ("compressed_logprobs", "bytepacked_indices")
    kinds = (pa.uint64(), pa.float32(), pa.float32()) if is_legacy else (pa.uint8(), pa.uint8())
    fields = [(name, pa.list_(pa.list_(kind))) for name, kind in zip(names, kinds, strict=True)]
    schema = pa.schema([("input_ids", pa.list_(pa.uint64())), *fields])
    rows = []
    for ids, log_probs in documents:
        top, tokens = torch.as_tensor(log_probs).double().topk(settings["k"])
        encode = legacy_row if is_legacy else current_row
        encoded = [encode(t, v, settings) for t, v in zip(tokens.tolist(), top.tolist(), strict=True)]
        # the distribution after the last token, which DistillKit has because of the padding token, is a copy here
        columns = zip(*encoded, encoded[-1], strict=True)
        rows.append({"input_ids": [*map(int, ids), 2]} | {name: list(column) for name, column in zip(names, columns, strict=True)})
    for number, start in enumerate(range(0, len(rows), rows_per_file)):
        pq.write_table(pa.Table.from_pylist(rows[start : start + rows_per_file], schema=schema), folder / f"data_{number}.parquet")
    (folder / "compression_config.yaml").write_text(json.dumps(settings))


def sample():
    """Three short documents over 400 tokens, and distributions that fall as a teacher's do; the same on every machine."""
    random = np.random.default_rng(0)
    documents = []
    for length in (5, 7, 6):
        order = np.argsort(random.random((length - 1, 400)), axis=1)
        values = np.empty((length - 1, 400))
        np.put_along_axis(values, order, np.tile(-1.5 * np.log1p(np.arange(400)), (length - 1, 1)) - random.random((length - 1, 1)), 1)
        documents.append((random.integers(3, 300, length), values - np.log(np.exp(values).sum(1, keepdims=True))))
    return documents


if __name__ == "__main__":
    for name, settings in (("current", CURRENT), ("legacy", LEGACY)):
        write(Path(sys.argv[1]) / f"distillkit-{name}", sample(), settings)
