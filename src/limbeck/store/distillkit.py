"""Captures made by DistillKit (github.com/arcee-ai/DistillKit): Parquet with a row per document, in its current and in its legacy codec.

A row has the `input_ids` of a document and, for the token after each of them but the last, the k most probable tokens: ids packed in as
few bits as the vocabulary needs, the first `exact_k` log-probabilities as they were, the others as a curve over their rank, fitted by a
few terms, and in the current codec what the curve misses, rounded. The settings lie beside it or in the recipe that trained with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from limbeck.errors import StoreError
from limbeck.spec import Spec, load_yaml, validate

SETTINGS = "compression_config.yaml"
SECTIONS = {"logprob_compressor": "current", "legacy_logit_compression": "legacy"}
"""Where the settings stand in a recipe of DistillKit, under `teacher`."""
MASS_ERROR = 0.05
"""Curves take the told mass so far past 1; more of it says that these are no log-probabilities, or other settings."""

Float = Literal["float16", "bfloat16", "float32", "float64"]
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Bin(Spec):
    """What the curve misses of some ranks: a scale, and a number of few bits for each."""

    scale_dtype: Float
    element_bits: int = Field(gt=0, le=64)
    num_elements: int = Field(gt=0)


class Current(Spec):
    """Settings of the current codec."""

    d: int = Field(gt=0)
    k: int = Field(gt=0)
    exact_k: int = Field(ge=0)
    exact_dtype: Float = "float32"
    polynomial_terms: list[Literal["sqrt", "exp"] | int] | None = None
    term_dtype: Float = "float32"
    residual_bins: list[Bin]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    columns: ClassVar[tuple[str, ...]] = ("compressed_logprobs", "bytepacked_indices")

    @model_validator(mode="after")
    def _fits(self) -> Current:
        if self.exact_k + sum(one.num_elements for one in self.residual_bins) > self.k:
            raise ValueError(f"found more exact values and residuals than the {self.k} of k")
        return self

    @property
    def vocabulary(self) -> int:
        return self.d

    @property
    def _bits(self) -> int:
        return math.ceil(math.log2(self.d))

    def num_bytes(self) -> int:
        """Of a token's `compressed_logprobs`."""
        parts = [self.exact_k * _BYTES[self.exact_dtype], len(self.polynomial_terms or ()) * _BYTES[self.term_dtype]]
        parts += [_BYTES[one.scale_dtype] + -(-one.element_bits * one.num_elements // 8) for one in self.residual_bins]
        return sum(parts)

    def decode(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities `[n, k]` of a row's n tokens, as they come."""
        blob = _matrix(row["compressed_logprobs"], np.uint8, self.num_bytes(), "compressed_logprobs")
        packed = _matrix(row["bytepacked_indices"], np.uint8, -(-self.k * self._bits // 8), "bytepacked_indices")
        rest = _Cursor(blob)
        exact = rest.floats(self.exact_dtype, self.exact_k)
        curve = np.zeros((len(blob), self.k - self.exact_k))
        if self.polynomial_terms:
            at = np.linspace(0, 1, curve.shape[1]) if self.normalize_t else np.arange(curve.shape[1], dtype=np.float64)
            terms = [at**term if isinstance(term, int) else getattr(np, term)(at) for term in self.polynomial_terms]
            curve += rest.floats(self.term_dtype, len(terms)) @ np.stack(terms)
        start = 0
        for one in self.residual_bins:
            scale = rest.floats(one.scale_dtype, 1)
            levels = _from_bits(rest.take(-(-one.element_bits * one.num_elements // 8)), one.element_bits, one.num_elements)
            signed = 2.0 * levels - 1.0 if one.element_bits == 1 else levels - 2.0 ** (one.element_bits - 1)
            curve[:, start : start + one.num_elements] += signed * scale
            start += one.num_elements
        values = np.concatenate([exact, curve], axis=1)
        return _from_bits(packed, self._bits, self.k), values.cumsum(1) if self.delta_encoding else values


class Legacy(Spec):
    """Settings of the legacy codec."""

    vocab_size: int = Field(gt=0)
    k: int = Field(gt=0)
    exact_k: int = Field(ge=0)
    polynomial_degree: int = Field(ge=0)
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: Float = "float32"

    columns: ClassVar[tuple[str, ...]] = ("packed_indices", "exact_values", "coeffs")

    @model_validator(mode="after")
    def _fits(self) -> Legacy:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k: found {self.exact_k}, expected at most {self.k}, k")
        return self

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    def decode(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities, or logits, `[n, k]` of a row's n tokens, as they come."""
        bits = math.ceil(math.log2(self.vocab_size))
        per_word = 64 // bits
        words = _matrix(row["packed_indices"], np.uint64, -(-self.k // per_word), "packed_indices")
        shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
        ids = (words[:, :, None] >> shifts) & np.uint64(2**bits - 1)
        at = np.arange(1, self.k - self.exact_k + 1, dtype=np.float64)
        terms = [at ** (-power if self.invert_polynomial else power) for power in range(self.polynomial_degree + 1)]
        terms += [np.sqrt(at)] if self.with_sqrt_term else []
        exact = _matrix(row["exact_values"], np.float64, self.exact_k, "exact_values")
        values = [exact]
        if len(at):
            values.append(_matrix(row["coeffs"], np.float64, len(terms), "coeffs") @ np.stack(terms))
        return ids.reshape(len(words), -1)[:, : self.k].astype(np.int64), np.concatenate(values, axis=1)


Settings = Current | Legacy


def read_settings(folder: str | Path, file: str | Path | None = None) -> Settings:
    """The settings of a capture: those that lie in its folder, or `file`, which has them or is a recipe of DistillKit with them."""
    path = Path(file) if file else Path(folder) / SETTINGS
    if file is None and not path.is_file():
        raise StoreError(
            f"{path}: missing; expected the settings with which DistillKit wrote the capture. Name a file with them: its own, or the "
            f"recipe that trained with the capture, which has them as teacher.{' or teacher.'.join(SECTIONS)}"
        )
    tree = load_yaml(path)
    inside = tree.get("teacher", tree) if isinstance(tree.get("teacher", tree), dict) else tree
    for section in SECTIONS:
        tree = inside[section] if isinstance(inside.get(section), dict) else tree
    where = str(path)
    return validate(Legacy, tree, where) if "vocab_size" in tree else validate(Current, tree, where)


@dataclass(frozen=True, order=True)
class Row:
    """Where a document lies: the file, its row group and the row in it."""

    file: int
    group: int
    row: int


class Files:
    """The Parquet files of a capture, of which one is open at a time. The row group that was read last stays in memory."""

    def __init__(self, folder: str | Path, settings: Settings) -> None:
        self.paths, self._settings = sorted(Path(folder).glob("**/*.parquet")), settings
        if not self.paths:
            raise StoreError(f"{folder}: found no .parquet, expected a capture by DistillKit")
        for number, path in enumerate(self.paths):
            with self._open(number) as file:
                names = file.schema_arrow.names
            if lacking := [name for name in ("input_ids", *settings.columns) if name not in names]:
                other = "legacy" if isinstance(settings, Current) else "current"
                raise StoreError(
                    f"{path}: found no column {lacking[0]!r}, expected it by these settings; captures in the {other} codec have others"
                )
        self._last: tuple[tuple[int, int], Any] = ((-1, -1), None)

    def documents(self) -> Iterator[tuple[Row, np.ndarray]]:
        """Every document's token ids."""
        for number in range(len(self.paths)):
            with self._open(number) as file:
                for group in range(file.num_row_groups):
                    column = file.read_row_group(group, columns=["input_ids"]).column(0)
                    for row, ids in enumerate(column.to_pylist()):
                        yield Row(number, group, row), np.array(ids, dtype=np.int64)

    def read(self, at: Row) -> tuple[np.ndarray, np.ndarray]:
        """Ids and values `[n, k]` for the tokens after the first n of a document."""
        if self._last[0] != (at.file, at.group):
            with self._open(at.file) as file:
                self._last = ((at.file, at.group), file.read_row_group(at.group, columns=list(self._settings.columns)))
        try:
            return self._settings.decode(self._last[1].slice(at.row, 1).to_pylist()[0])
        except ValueError as error:
            raise StoreError(f"{self.paths[at.file]}: {error}; the settings are not those with which it was written") from None

    @contextmanager
    def _open(self, number: int) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.paths[number]) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{self.paths[number]}: cannot be read as Parquet ({error})") from None


class _Cursor:
    """Takes bytes off a matrix `[n, bytes]` from the left."""

    def __init__(self, blob: np.ndarray) -> None:
        self._blob, self._at = blob, 0

    def take(self, num: int) -> np.ndarray:
        self._at += num
        return self._blob[:, self._at - num : self._at]

    def floats(self, dtype: str, num: int) -> np.ndarray:
        part = np.ascontiguousarray(self.take(num * _BYTES[dtype]))
        if dtype == "bfloat16":  # the upper half of a float32
            return (part.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64).reshape(len(part), num)
        return part.view(f"<f{_BYTES[dtype]}").astype(np.float64).reshape(len(part), num)


def _from_bits(packed: np.ndarray, bits: int, num: int) -> np.ndarray:
    """Numbers `[n, num]` of so many bits, the highest first, from bytes `[n, ...]`."""
    stream = np.unpackbits(np.ascontiguousarray(packed), axis=1)[:, : bits * num].reshape(len(packed), num, bits)
    return stream.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _matrix(rows: Any, dtype: Any, width: int, name: str) -> np.ndarray:
    found = {len(row) for row in rows}
    if found - {width}:
        raise ValueError(f"{name}: found {sorted(found - {width})[0]} values per token, expected {width}")
    return np.array(rows, dtype=dtype).reshape(len(rows), width)
