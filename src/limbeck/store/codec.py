"""Codec: how a capture keeps what a teacher says of the next token. The class is its own config; torch is imported when it runs.

A codec turns the teacher's last hidden states at scored tokens into one blob of bytes per sample, and blobs back into the output fields of
a Signal. Files, checksums, samples and offsets are no business of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from limbeck.spec import Family

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.batch import Signal
    from limbeck.objectives.head import Head

Support = Literal["dense", "top_k", "sampled"]


class Codec(Family):
    """Base of the family of codecs."""

    type: str

    needs_head: ClassVar[bool] = False
    """Whether the store keeps the teacher's output head, which `decode` then gets."""
    tuned: ClassVar[str] = ""
    """The field that says how much is kept, for who has a target of bytes or KL; empty where there is none."""
    ladder: ClassVar[tuple[float, ...]] = ()
    """Its values, among which is chosen."""

    def meant_by(self, bytes_per_token: float | None) -> tuple[float, ...]:
        """More values of it, where so many bytes are wanted."""
        return ()

    @property
    def support(self) -> Support:
        """What `decode` gives, so that a recipe is refused before anything is loaded."""
        return "dense"

    @property
    def serves(self) -> tuple[float, ...] | None:
        """The temperatures for which it can serve: its `temperatures`, where it has such a field; None for all."""
        return getattr(self, "temperatures", None)

    def calibrate(self, head: Head, outputs: Iterable[Tensor], others: Iterable[Tensor] = ()) -> dict[str, Tensor]:
        """What is fitted once per capture, from the teacher's last hidden states `[n, E]` of documents that no fidelity is measured on. On
        `others` it is: they may say how much is kept, and nothing else. The teacher runs only if either is walked; that may be more than
        once."""
        return {}

    def doubt(self, outputs: Iterable[Tensor]) -> str | None:
        """What is to be said of a fit on these documents; None where all is well."""
        return None

    def encode(self, head: Head, model: Mapping[str, Tensor], output: Tensor, lengths: Sequence[int]) -> list[bytes]:
        """A blob per sample from the rows `[n, E]` of several, one after the other; `lengths` sum to n. Equal rows give equal bytes."""
        raise NotImplementedError

    def decode(self, head: Head | None, model: Mapping[str, Tensor], blobs: Sequence[bytes], rows: Sequence[np.ndarray]) -> Signal:
        """The output fields of a Signal for the wanted rows of each blob, in that order; on the CPU, but for the head."""
        raise NotImplementedError


class Exact(Codec):
    """The teacher's last hidden states as they are, with its head kept once: every temperature and divergence is exact."""

    type: Literal["exact"] = "exact"

    needs_head: ClassVar[bool] = True

    def encode(self, head: Head, model: Mapping[str, Tensor], output: Tensor, lengths: Sequence[int]) -> list[bytes]:
        return [to_bytes(rows) for rows in output.split(list(lengths))]

    def decode(self, head: Head | None, model: Mapping[str, Tensor], blobs: Sequence[bytes], rows: Sequence[np.ndarray]) -> Signal:
        import torch

        from limbeck.batch import Signal

        assert head is not None
        width, dtype = head.weight.shape[1], head.weight.dtype
        parts = [from_bytes(blob, dtype, width, wanted) for blob, wanted in zip(blobs, rows, strict=True)]
        return Signal(output=torch.cat(parts) if parts else torch.zeros(0, width, dtype=dtype), teacher_head=head)


def to_bytes(rows: Tensor) -> bytes:
    """The bytes of a tensor, row after row, little-endian as every machine that torch runs on."""
    import torch

    rows = rows.detach().cpu().contiguous()
    array: np.ndarray = (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()
    return array.tobytes()


def from_bytes(blob: bytes, dtype: Any, width: int, rows: np.ndarray | slice = slice(None)) -> Tensor:
    """Rows of `to_bytes`, in memory of their own."""
    import torch

    is_bfloat16 = dtype == torch.bfloat16
    kind = np.int16 if is_bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
    found = torch.from_numpy(np.array(np.frombuffer(blob, kind).reshape(-1, width)[rows]))
    return found.view(torch.bfloat16) if is_bfloat16 else found
