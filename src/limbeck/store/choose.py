"""Choosing how much a codec keeps, so that a capture meets a target of bytes or of fidelity: by measuring, on documents of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from limbeck.errors import StoreError
from limbeck.log import progress
from limbeck.spec import Spec
from limbeck.store.certificate import certify, in_words
from limbeck.store.codec import Codec

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.objectives.head import Head


class Target(Spec):
    """What is wanted of a capture: one of the two."""

    kl: float | None = Field(None, gt=0)
    bytes_per_token: float | None = Field(None, gt=1)

    @property
    def text(self) -> str:
        return f"a KL of at most {self.kl:g}" if self.kl is not None else f"at most {self.bytes_per_token:g} bytes per token"

    @property
    def key(self) -> str:
        return "capture.target_kl" if self.kl is not None else "capture.bytes_per_token"

    def is_met(self, found: dict[str, Any]) -> bool:
        if self.kl is not None:
            return bool(found["kl"] <= self.kl)
        assert self.bytes_per_token is not None
        return bool(found["bytes_per_token"] <= self.bytes_per_token)


def choose(codec: Codec, target: Target, head: Head, fitted: Iterable[Tensor], others: Iterable[Tensor]) -> tuple[Codec, dict[str, Tensor]]:
    """The codec with the setting that meets a target, and what it calibrated on `fitted`: the one that keeps least where a KL is wanted,
    and most where bytes are. Fidelity rises with the setting, so that half of those left are ruled out by a measurement on `others`."""
    vocabulary = head.weight.shape[0]
    values = sorted(
        {value for value in (*codec.ladder, *codec.meant_by(target.bytes_per_token)) if codec.tuned != "k" or value <= vocabulary}
    )
    tried: dict[int, tuple[Codec, dict[str, Tensor], dict[str, Any]]] = {}

    def is_met(at: int) -> bool:
        one = codec.model_copy(update={codec.tuned: values[at]})
        model = one.calibrate(head, fitted, others)
        found = certify(one, head, model, others)
        if found is None:
            raise StoreError(
                f"{target.key}: the source has too few conversations to measure on; expected more, or the setting in capture.codec"
            )
        tried[at] = one, model, found
        bar.advance()
        return target.is_met(found)

    # smallest that meets a KL; largest that meets bytes is the one before the smallest that does not
    low, high, wants_kl = 0, len(values), target.kl is not None
    with progress("choose the codec", len(values).bit_length()) as bar:
        while low < high:
            middle = (low + high) // 2
            if is_met(middle) == wants_kl:
                high = middle
            else:
                low = middle + 1
        best = low if wants_kl else low - 1
    if best not in tried:
        one, _, found = tried[min(max(best, 0), len(values) - 1)]
        raise StoreError(
            f"{target.key}: found {target.text}, expected what this codec attains: {chosen(one, None, found)}; or another codec"
        )
    return tried[best][:2]


def chosen(codec: Codec, target: Target | None, certificate: dict[str, Any]) -> str:
    """A choice in words."""
    wanted = f" for {target.text}" if target else ""
    measured = f"{certificate['bytes_per_token']:.1f} bytes per token, {in_words(certificate)}"
    setting = f"{codec.type} with {codec.tuned} = {getattr(codec, codec.tuned):g}"
    return f"{setting}{wanted}: measured {measured} on {certificate['num_scored']:,} tokens of other documents"
