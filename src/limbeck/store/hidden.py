"""Hidden codecs: how a capture keeps the residual stream after a block. Its own config, as a Codec is; one blob per sample and block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from limbeck.spec import Family
from limbeck.store.codec import from_bytes, to_bytes

if TYPE_CHECKING:
    from torch import Tensor


class HiddenCodec(Family):
    """Base of the family of hidden codecs. `model` is what `calibrate` gave for the block."""

    type: str

    is_exact_for: ClassVar[tuple[str, ...]] = ()
    """Dtypes of a teacher whose states come back as they were."""

    def calibrate(self, states: Iterable[Tensor]) -> dict[str, Tensor]:
        """What is fitted once per capture and block, from states `[r, E]` of documents that no error is measured on."""
        return {}

    def encode(self, model: Mapping[str, Tensor], states: Tensor) -> bytes:
        """The blob of one sample's states `[r, E]`."""
        raise NotImplementedError

    def decode(self, model: Mapping[str, Tensor], blob: bytes, rows: np.ndarray, width: int) -> Tensor:
        """The wanted rows, `[len(rows), width]`."""
        raise NotImplementedError


class _Plain(HiddenCodec):
    """States in a floating type, row after row."""

    @property
    def dtype(self) -> Any:
        import torch

        return getattr(torch, self.type)

    def encode(self, model: Mapping[str, Tensor], states: Tensor) -> bytes:
        return to_bytes(states.to(self.dtype))

    def decode(self, model: Mapping[str, Tensor], blob: bytes, rows: np.ndarray, width: int) -> Tensor:
        return from_bytes(blob, self.dtype, width, rows)


class Float32(_Plain):
    """Four bytes per value: what a teacher in float32 says."""

    type: Literal["float32"] = "float32"
    is_exact_for: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")


class BFloat16(_Plain):
    """Two bytes per value: what a teacher in bfloat16 says, and one in float32 to three digits."""

    type: Literal["bfloat16"] = "bfloat16"
    is_exact_for: ClassVar[tuple[str, ...]] = ("bfloat16",)


class Int8(HiddenCodec):
    """A byte per value, and four per token.

    Channels differ by orders of magnitude, so each is divided by a scale of its own, which calibration fixes. Then each token is divided by
    its largest value: the few tokens with states a thousand times as large as others (the first of a text) lose nothing, nor do the others.
    """

    type: Literal["int8"] = "int8"

    def calibrate(self, states: Iterable[Tensor]) -> dict[str, Tensor]:
        import torch

        # the mean of what channels take of their token: no single token decides
        shares = [rows.float().abs() / rows.float().norm(dim=1, keepdim=True).clamp(min=1e-30) for rows in states]
        scale = torch.cat(shares).mean(0)
        return {"scale": scale.clamp(min=float(scale.max()) * 1e-4)}

    def encode(self, model: Mapping[str, Tensor], states: Tensor) -> bytes:
        scaled = states.float().cpu() / model["scale"]
        largest = scaled.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return to_bytes(largest) + (scaled / largest).round().char().numpy().tobytes()

    def decode(self, model: Mapping[str, Tensor], blob: bytes, rows: np.ndarray, width: int) -> Tensor:
        import torch

        split = len(blob) // (4 + width) * 4
        largest = from_bytes(blob[:split], torch.float32, 1, rows)
        return from_bytes(blob[split:], torch.int8, width, rows) * (largest * model["scale"])


class Pca(HiddenCodec):
    """The states' first principal components, two bytes for each. What varies little over the calibration documents is lost."""

    type: Literal["pca"] = "pca"
    components: int = Field(64, gt=0)
    """How many are kept, at most as many as the states have channels."""

    def calibrate(self, states: Iterable[Tensor]) -> dict[str, Tensor]:
        import torch

        rows = torch.cat([part.float() for part in states]).double()
        mean = rows.mean(0)
        variances, basis = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))  # ascending
        basis = basis.flip(1)[:, : self.components]
        # an eigenvector's sign is free; fixed, the same states give the same basis everywhere
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        deviation = variances.flip(0)[: self.components].clamp(min=0).sqrt()
        deviation = deviation.clamp(min=float(deviation.max()) * 1e-6 + 1e-30)
        return {"mean": mean.float(), "basis": basis.float().contiguous(), "deviation": deviation.float()}

    def encode(self, model: Mapping[str, Tensor], states: Tensor) -> bytes:
        import torch

        coefficients = (states.float().cpu() - model["mean"]) @ model["basis"] / model["deviation"]
        return to_bytes(coefficients.clamp(-65504, 65504).to(torch.float16))

    def decode(self, model: Mapping[str, Tensor], blob: bytes, rows: np.ndarray, width: int) -> Tensor:
        import torch

        coefficients = from_bytes(blob, torch.float16, model["basis"].shape[1], rows).float()
        return coefficients * model["deviation"] @ model["basis"].T + model["mean"]
