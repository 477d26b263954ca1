"""Data sets: conversations from files, the hub or Python, rendered once, shuffled anew in every epoch, mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from limbeck.errors import DataError
from limbeck.sources.base import Source
from limbeck.sources.order import Mixed, Order, Shuffled
from limbeck.tokens.datasets import Chosen, DataSet, DataSets, sets_of
from limbeck.tokens.sample import Sample

if TYPE_CHECKING:
    from limbeck.tokens.render import RenderReport


class DatasetSource(Source):
    """Conversations, completions or plain texts that somebody wrote."""

    type: Literal["dataset"] = "dataset"
    data: DataSets
    """File, data set in Limbeck's cache, or one shipped with Limbeck; a mapping that says more (`{hub: owner/name, split: train}`); or a
    list of these, all of them used, by weight where they have one."""
    max_length: int = Field(1024, gt=1)
    """Most tokens of a sample; what is lost by it is counted and reported. A capture serves every smaller value too."""
    too_long: Literal["cut", "split", "drop"] | None = None
    """What becomes of a longer row: its end is `cut` off, it is `split` into samples of their own, each without what came before, or left
    out (`drop`). Where it is not set, plain texts are split and conversations cut."""
    min_length: int = Field(0, ge=0)
    """Rows of fewer tokens are left out."""
    limit: int | None = Field(None, gt=0)
    """Use only this many rows, from the start of the data."""

    @field_validator("data")
    @classmethod
    def _some(cls, data: DataSets) -> DataSets:
        if not data:
            raise ValueError("found nothing, expected a file or the name of a data set")
        weights = [part.weight for part in sets_of(data) if part.weight is not None]
        if weights and len(weights) < len(sets_of(data)):
            raise ValueError(f"found `weight` in {len(weights)} of {len(sets_of(data))} data sets, expected it in all or none")
        if weights and max(weights) > 1e6 * min(weights):
            raise ValueError(f"found weights from {min(weights)} to {max(weights)}, expected none more than a million times another")
        return data

    @model_validator(mode="after")
    def _lengths(self) -> DatasetSource:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length: found {self.min_length}, expected at most max_length, {self.max_length}")
        if self.limit is not None and self.weights:
            raise ValueError("found `limit` with weights; give each data set its own")
        return self

    @property
    def sets(self) -> list[DataSet]:
        return sets_of(self.data)

    @property
    def names(self) -> list[str]:
        return [part.path for part in self.sets if part.path is not None]

    @property
    def modules(self) -> list[str]:
        return [part.convert.partition(":")[0] for part in self.sets if part.convert is not None]

    @property
    def weights(self) -> list[float]:
        """The sets' weights; empty where they have none."""
        return [part.weight for part in self.sets if part.weight is not None]

    def check(self) -> None:
        for part in self.sets:
            part.check()

    def chosen(self) -> list[Chosen]:
        """The rows of each set that are used."""
        found, left = [], self.limit
        for part in self.sets:
            found.append(part.read() if left is None else part.read().first(left))
            left = None if left is None else left - len(found[-1].conversations)
        return found

    def open(self, tokenizer: Any, seed: int) -> OpenDataset:
        from limbeck.tokens.render import Limits, render_sets

        chosen = self.chosen()
        limits = Limits(self.max_length, self.min_length, self.too_long)
        samples, report = render_sets([each.conversations for each in chosen], tokenizer, limits)
        return OpenDataset(samples, report, seed, self.weights, [each.describe() for each in chosen])


class OpenDataset:
    """Rendered samples and their order."""

    def __init__(
        self,
        sets: Sequence[Sequence[Sample]],
        report: RenderReport,
        seed: int,
        weights: Sequence[float] = (),
        origins: Sequence[dict[str, Any]] = (),
    ) -> None:
        for part, origin in zip(sets, origins, strict=False):
            if weights and not part:
                raise DataError(f"{origin['name']}: found no sample with a scored token, expected some for its weight in the mixture")
        self.samples: Sequence[Sample] = [sample for part in sets for sample in part]
        self.report, self.origins = report, [{**origin, "samples": len(part)} for origin, part in zip(origins, sets, strict=True)]
        self.order: Order = Mixed([len(part) for part in sets], weights, seed) if weights else Shuffled(len(self.samples), seed)

    def at(self, step: int, batch_size: int) -> list[Sample]:
        """Positions step * batch_size onwards of the endless sequence."""
        return [self.samples[self.order.at(position)] for position in range(step * batch_size, (step + 1) * batch_size)]

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-self.order.epoch // batch_size)

    def describe(self) -> dict[str, Any]:
        from limbeck.tokens.datasets import data_hash

        return {**asdict(self.report), "data": self.origins, "data_sha256": data_hash(self.samples)}
