"""Jobs: things to do, some of them after others, and who does them. Here one by one, in this process; on a cluster: on_ray.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Job:
    """One thing to do. What it leaves lies on the disk; started again, it goes on where it was."""

    name: str
    do: Callable[[], Any]
    """May be called in another process: its parts can be pickled, and what it returns too."""
    after: tuple[str, ...] = ()
    """Names of jobs of the same list that have to be done before, all of which stand before this one."""


class Worker(Protocol):
    """Holds what several jobs need, such as a loaded teacher."""

    def __call__(self, item: Any) -> Any: ...


class Executor(Protocol):
    """Who does it."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[str, Any]]:
        """Do all jobs; the name of each and what it returned, as it is done."""
        ...

    def map(self, make: Callable[[], Worker], items: Sequence[int]) -> Iterable[Any]:
        """What workers return for the items, in any order. Each worker is made once, where it works."""
        ...


class Local:
    """One after the other, in the order in which they are given."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[str, Any]]:
        for job in jobs:
            yield job.name, job.do()

    def map(self, make: Callable[[], Worker], items: Sequence[int]) -> Iterable[Any]:
        return map(make(), items)
