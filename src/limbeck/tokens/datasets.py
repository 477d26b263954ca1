"""Data sets: where rows come from, and which of them are used. What a row means is formats.py's part, and rendering render.py's.

A set has two sides: the rows that are trained on, and with `held_out` those that a benchmark may use and training never sees.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from limbeck.cache import resolve_data
from limbeck.errors import DataError, nearest
from limbeck.plugins import imported
from limbeck.spec import Spec
from limbeck.tokens.files import rows_of
from limbeck.tokens.formats import EXPECTED, Format, conversation_of
from limbeck.tokens.sample import Conversation, Sample
from limbeck.tokens.stated import in_words


class DataSet(Spec):
    """One data set: its origin (`path`, `hub` or `rows`), and which of its rows are used."""

    path: str | None = None
    """A file (JSON lines, JSON, CSV, Parquet, Arrow), a data set in Limbeck's cache, or one shipped with Limbeck."""
    hub: str | None = None
    """A data set of the Hugging Face hub, or a folder that is laid out like one. Needs the extra `data`."""
    rows: list[dict[str, Any]] | None = None
    """The rows themselves, from Python. They become part of the recipe."""
    split: str | None = None
    """Split of a hub data set, such as `train` (where it is not set), `test` or `train[:5%]`."""
    subset: str | None = None
    """Subset (configuration) of a hub data set that has several."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set; pin it, or the data may change between runs."""
    format: Format | None = None
    """What the rows are; told by their columns where it is not set. `sharegpt` rows have `conversations`, `alpaca` rows `instruction`."""
    convert: str | None = None
    """`module:function`, importable from the working directory, that is called with every row and returns one of a known format, or None to
    leave the row out. It is your code, and runs."""
    tools: Literal["template", "stated"] = "template"
    """How the model is told of a row's tools: by the tokenizer's chat template, or `stated` in words, with calls as text, where that has no
    place for them. A model is asked likewise by the benchmark `function_calling`."""
    held_out: float | None = Field(None, gt=0, lt=1)
    """Share of the rows, drawn by their content, that training leaves out; a benchmark with the same setting uses only these."""
    limit: int | None = Field(None, gt=0)
    """Use only this many rows: the first, or with `seed` any."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Draws the rows of `limit`, and those of `held_out`. A smaller limit takes a part of what a larger one takes."""
    weight: float | None = Field(None, gt=0)
    """In a mixture: this set's share of the samples, relative to the other weights; without any, each row is used once per epoch."""

    @field_validator("rows", mode="before")
    @classmethod
    def _plain(cls, rows: Any) -> Any:
        """A copy of any sequence of mappings (a list, a `datasets.Dataset`), in the form in which the recipe is written."""
        if rows is None or isinstance(rows, str | dict) or not isinstance(rows, Iterable):
            return rows
        try:
            return json.loads(json.dumps(list(rows)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected rows of texts, numbers, lists and mappings: {error}") from None

    @field_validator("convert")
    @classmethod
    def _function(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
            raise ValueError(f"found {name!r}, expected `module:function`")
        return name

    @model_validator(mode="after")
    def _one_origin(self) -> DataSet:
        given = [key for key in ("path", "hub", "rows") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none of them'}, expected one of `path`, `hub` and `rows`")
        if self.hub is None and (foreign := [key for key in ("split", "subset", "revision") if getattr(self, key) is not None]):
            raise ValueError(f"found `{foreign[0]}` with `{given[0]}`; only data sets of the hub (`hub: owner/name`) have it")
        return self

    @property
    def name(self) -> str:
        """How the set is named in reports."""
        if self.hub is not None:
            return ":".join(part for part in (self.hub, self.subset, self.split) if part)
        return self.path or "rows"

    def check(self) -> None:
        """Refuse what is not there (a file, a package, a function), before any row is read."""
        if self.path is not None:
            self._file()
        if self.hub is not None:
            from limbeck.tokens.hub import require_datasets

            require_datasets(self.hub)
        if self.convert is not None:
            _function_named(self.convert)

    def read(self, held_out: bool = False) -> Chosen:
        """The rows of one side, in their order."""
        counts = {"rows": 0, "left_out": 0, "other_side": 0}
        conversations = [conversation for _, conversation in self._limited(self._conversations(held_out, counts))]
        if self.tools == "stated":
            conversations = [in_words(conversation) for conversation in conversations]
        if not counts["rows"]:
            raise DataError(f"{self.name}: found no rows, expected rows with {EXPECTED}")
        return Chosen(self.name, conversations, counts["rows"], counts["left_out"], counts["other_side"])

    def with_rows(self, held_out: bool = False) -> Iterable[tuple[Any, Conversation]]:
        """The same with each conversation's row, which may have other columns."""
        return self._limited(self._conversations(held_out, Counter()))

    def _conversations(self, held_out: bool, counts: dict[str, int]) -> Iterator[tuple[Any, Conversation]]:
        convert = _function_named(self.convert) if self.convert is not None else None
        for where, row in self._rows():
            counts["rows"] += 1
            if convert is not None:
                row = _converted(convert, row, where, str(self.convert))
                if row is None:
                    counts["left_out"] += 1
                    continue
            conversation = conversation_of(row, where, self.format)
            if self.held_out is not None and (_draw(conversation, "held out", self.seed) < self.held_out) != held_out:
                counts["other_side"] += 1
                continue
            yield row, conversation

    def _limited(self, pairs: Iterator[tuple[Any, Conversation]]) -> Iterable[tuple[Any, Conversation]]:
        if self.limit is None or self.seed is None:
            return islice(pairs, self.limit)
        numbered = ((_draw(pair[1], "limit", self.seed), number, pair) for number, pair in enumerate(pairs))
        drawn = heapq.nsmallest(self.limit, numbered, key=lambda item: item[:2])
        return [pair for _, _, pair in sorted(drawn, key=lambda item: item[1])]

    def _rows(self) -> Iterator[tuple[str, Any]]:
        if self.path is not None:
            return rows_of(self._file())
        if self.rows is not None:
            return ((f"row {number}", row) for number, row in enumerate(self.rows, 1))
        from limbeck.tokens.hub import hub_rows

        assert self.hub is not None
        rows = hub_rows(self.hub, self.subset, self.split or "train", self.revision)
        return ((f"{self.name}: row {number}", row) for number, row in enumerate(rows, 1))

    def _file(self) -> Path:
        assert self.path is not None
        try:
            return resolve_data(self.path)
        except DataError as error:
            is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.path) and not Path(self.path).suffix
            hint = f"; a data set of the hub is named {{hub: {self.path}}}" if is_hub_name else ""
            raise DataError(f"{error}{hint}") from None


def _form(value: Any) -> str | None:
    return next((form for form, cls in (("name", str), ("set", dict | DataSet), ("list", list)) if isinstance(value, cls)), None)


_AS_WRITTEN = Discriminator(_form, "data", "expected a file or the name of a data set, a mapping, or a list of these")
_One = Annotated[Annotated[str, Tag("name")] | Annotated[DataSet, Tag("set")], _AS_WRITTEN]
_List = Annotated[list[_One], Tag("list")]
DataSets = Annotated[Annotated[str, Tag("name")] | Annotated[DataSet, Tag("set")] | _List, _AS_WRITTEN]
"""How a field names data: a path or name, a mapping that says more, or a list of either."""


def sets_of(data: str | DataSet | Sequence[str | DataSet]) -> list[DataSet]:
    """`data` as data sets; a bare text is a path or name."""
    items = [data] if isinstance(data, str | DataSet) else data
    return [DataSet(path=item) if isinstance(item, str) else item for item in items]


@dataclass(frozen=True)
class Chosen:
    """The rows of a set that are used, and what became of the others."""

    name: str
    conversations: list[Conversation]
    num_rows: int
    """Rows that were read; with `limit` and no `seed`, reading stops there."""
    num_left_out: int
    """Rows for which `convert` returned None."""
    num_other_side: int
    """Rows of the other side of `held_out`."""

    def first(self, limit: int) -> Chosen:
        """The same with at most so many of its rows."""
        return replace(self, conversations=self.conversations[:limit])

    def describe(self) -> dict[str, Any]:
        """Counts for reports."""
        formats = dict(Counter(conversation.format for conversation in self.conversations))
        counts = {"rows_read": self.num_rows, "rows_used": len(self.conversations), "formats": formats}
        return {"name": self.name, **counts, "left_out_by_convert": self.num_left_out, "held_out": self.num_other_side}


def read_conversations(path: Path, limit: int | None = None) -> list[Conversation]:
    """The conversations of a file, or of its first `limit` rows."""
    return DataSet(path=str(path), limit=limit).read().conversations


def data_hash(samples: Iterable[Sample]) -> str:
    """SHA-256 over the ids and target masks of the samples, in their order: equal exactly where runs see the same tokens."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(sample.ids, dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(sample.is_target, dtype=np.uint8).tobytes())
    return digest.hexdigest()


def _draw(conversation: Conversation, purpose: str, seed: int | None) -> float:
    """A number in [0, 1) that depends on what the row says, and neither on its place nor on other rows: its copies share its fate."""
    digest = hashlib.sha256(f"{purpose} {seed or 0} {conversation.content}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _converted(convert: Callable[[Any], Any], row: Any, where: str, name: str) -> Any:
    try:
        return convert(row)
    except Exception as error:  # the user's code: whatever it raises is about this row
        raise DataError(f"{where}: convert {name!r} raised {type(error).__name__}: {error}") from error


def _function_named(name: str) -> Callable[[Any], Any]:
    """The function that `module:function` names, looked for in the working directory first."""
    module, _, attribute = name.partition(":")
    found: Any = imported(module, f"convert {name!r}", DataError)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise DataError(f"convert {name!r}: {module} has no {part!r}{nearest(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise DataError(f"convert {name!r}: found {type(found).__name__}, expected a function of a row")
    return found  # type: ignore[no-any-return]
