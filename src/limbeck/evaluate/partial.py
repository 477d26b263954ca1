"""What is graded so far of a benchmark that is not finished: `NAME.partial.jsonl` beside the results.

Its first line says which model is graded on which cases with which settings, as a result does; each further line is an item, with the
seconds that were spent until then. What was killed while it wrote leaves a line without its end, which counts for nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from limbeck.errors import RunError
from limbeck.evaluate.base import Item
from limbeck.run import appearing, complete_lines


class Partial:
    """The items of one benchmark as they are graded, kept in `file` (nowhere, where it is None)."""

    def __init__(self, file: Path | None, identity: dict[str, Any]) -> None:
        self._file = file
        self._identity = json.loads(json.dumps(identity))
        self.items: dict[str, Item] = {}
        self.seconds = 0.0
        """Seconds of grading, those of earlier runs included."""
        if file is not None:
            self._read(file)

    def collect(self, graded: Iterable[Item]) -> Iterator[Item]:
        """Pass on and keep each item that was not there, as it comes."""
        start = time.perf_counter() - self.seconds
        if self._file is None:
            yield from graded
            self.seconds = time.perf_counter() - start
            return
        try:
            self._begin(self._file)
            with open(self._file, "a", encoding="utf-8") as stream:
                for item in graded:
                    self.seconds = time.perf_counter() - start
                    if item.id in self.items:
                        continue
                    stream.write(_line(item, self.seconds))
                    stream.flush()
                    yield item
        except OSError as error:
            raise RunError(f"{self._file}: could not be written ({error})") from error
        self.seconds = time.perf_counter() - start

    def _read(self, file: Path) -> None:
        """Take what an earlier run left, if it graded the same."""
        try:
            first, *rest = complete_lines(file)
            items = [(Item(**line["item"]), float(line["seconds"])) for line in rest]
        except (ValueError, KeyError, TypeError):  # empty, or of another version of Limbeck
            return
        if first == self._identity and items:
            self.items = {item.id: item for item, _ in items}
            self.seconds = items[-1][1]

    def _begin(self, file: Path) -> None:
        """Write what is there anew: after the half of a line, another could not be told from it."""
        with appearing(file) as temporary, open(temporary, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(self._identity, ensure_ascii=False) + "\n")
            stream.writelines(_line(item, self.seconds) for item in self.items.values())


def _line(item: Item, seconds: float) -> str:
    return json.dumps({"seconds": round(seconds, 3), "item": asdict(item)}, ensure_ascii=False) + "\n"
