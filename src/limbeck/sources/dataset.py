"""A data set: conversations from JSON-lines files, rendered once, shuffled anew in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from limbeck.cache import resolve_data
from limbeck.errors import DataError
from limbeck.sources.base import Source
from limbeck.tokens.sample import Sample

if TYPE_CHECKING:
    from limbeck.tokens.render import RenderReport


class DatasetSource(Source):
    """Rows of `messages` (with optional `tools`) or of `prompt` and `completion`, as JSON lines."""

    type: Literal["dataset"] = "dataset"
    data: str | list[str]
    """File, data set in Limbeck's cache, or one shipped with Limbeck; or a list of them, one after the other."""
    max_length: int = Field(1024, gt=1)
    """Tokens after which a conversation is cut; what was cut is counted and reported. A capture serves every smaller value too."""
    limit: int | None = Field(None, gt=0)
    """Use only this many rows, from the start of the data."""

    @field_validator("data")
    @classmethod
    def _some(cls, data: str | list[str]) -> str | list[str]:
        if not data:
            raise ValueError("found nothing, expected a file or the name of a data set")
        return data

    @property
    def names(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else self.data

    def open(self, tokenizer: Any, seed: int) -> OpenDataset:
        from limbeck.tokens.datasets import read_conversations
        from limbeck.tokens.render import render_all

        conversations = [row for name in self.names for row in read_conversations(resolve_data(name))]
        samples, report = render_all(conversations[: self.limit], tokenizer, self.max_length)
        return OpenDataset(samples, report, seed)


class OpenDataset:
    """Rendered samples and their order."""

    def __init__(self, samples: Sequence[Sample], report: RenderReport, seed: int) -> None:
        if not samples:
            raise DataError("the data set has no sample with a scored token")
        self.samples, self.report, self.seed = samples, report, seed
        self._orders: dict[int, list[int]] = {}

    def at(self, step: int, batch_size: int) -> list[Sample]:
        """Positions step * batch_size onwards of the endless sequence of shuffled epochs."""
        size = len(self.samples)
        positions = range(step * batch_size, (step + 1) * batch_size)
        return [self.samples[self._order(position // size)[position % size]] for position in positions]

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self.samples) // batch_size)

    def describe(self) -> dict[str, Any]:
        from dataclasses import asdict

        from limbeck.tokens.datasets import data_hash

        return {**asdict(self.report), "data_sha256": data_hash(self.samples)}

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            import numpy as np

            self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples)).tolist()
        return self._orders[epoch]
