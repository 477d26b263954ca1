"""Plan: which samples make up which shard, and which of them share a forward of the teacher. Torch-free.

A plan is a function of what is asked for, and of what older passes hold; not of the workers, nor of what was done before a kill. So a
capture that goes on, on any number of workers, makes the shards of one that never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from limbeck.objectives.base import Needs
from limbeck.store.manifest import Manifest, Pass
from limbeck.tokens.sample import Sample


@dataclass(frozen=True)
class Wanted:
    """A sample, and what is asked of the teacher about it."""

    sample: Sample
    needs: Needs


@dataclass(frozen=True)
class Plan:
    """A pass, and the batches of each of its shards."""

    its: Pass
    shards: tuple[tuple[Sequence[Wanted], ...], ...]

    def todo(self, manifest: Manifest) -> list[tuple[int, tuple[Sequence[Wanted], ...]]]:
        """(number, batches) of the shards that are not there."""
        done = {shard.number for shard in manifest.shards}
        return [(number, batches) for number, batches in enumerate(self.shards, self.its.first) if number not in done]


def once(groups: Iterable[tuple[Sequence[Sample], Needs]]) -> list[Wanted]:
    """Every sample id once, with all that is asked of it, in order of length: batches of like lengths waste no padding."""
    unique: dict[int, Wanted] = {}
    for samples, needs in groups:
        for sample in samples:
            old = unique.get(sample.sample_id, Wanted(sample, needs))
            unique[sample.sample_id] = Wanted(_both(old.sample, sample), old.needs | needs)
    return sorted(unique.values(), key=lambda wanted: (len(wanted.sample.ids), wanted.sample.sample_id))


def make_plan(
    wanted: Sequence[Wanted], manifest: Manifest, is_held: Callable[[Wanted, int], bool], batch_size: int, samples_per_shard: int
) -> Plan | None:
    """The pass that makes what is wanted: one that was begun, else a new one with what no shard holds; None where nothing is missing.

    `is_held(wanted, n)` says whether a shard of a number below n holds it.
    """
    for begun in reversed(manifest.passes):
        rest = [one for one in wanted if not is_held(one, begun.first)]
        if _digest(rest, batch_size, samples_per_shard) == begun.digest:
            return Plan(begun, _cut(rest, batch_size, samples_per_shard))
    first = sum(begun.num_shards for begun in manifest.passes)
    rest = [one for one in wanted if not is_held(one, first)]
    if not rest:
        return None
    shards = _cut(rest, batch_size, samples_per_shard)
    return Plan(Pass(digest=_digest(rest, batch_size, samples_per_shard), first=first, num_shards=len(shards)), shards)


def _cut(wanted: Sequence[Wanted], batch_size: int, samples_per_shard: int) -> tuple[tuple[Sequence[Wanted], ...], ...]:
    """Shards of whole batches."""
    batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    per_shard = -(-samples_per_shard // batch_size)
    return tuple(tuple(batches[start : start + per_shard]) for start in range(0, len(batches), per_shard))


def _digest(wanted: Sequence[Wanted], batch_size: int, samples_per_shard: int) -> str:
    digest = hashlib.sha256(f"{batch_size} {samples_per_shard}".encode())
    for one in wanted:
        digest.update(f"{one.sample.sample_id} {len(one.sample.ids)} {one.needs.output} {sorted(one.needs.layers)}".encode())
        digest.update(np.packbits(one.sample.is_target).tobytes())
    return digest.hexdigest()


def _both(a: Sample, b: Sample) -> Sample:
    """The longer cut of a sample, with the targets of both."""
    short, long = sorted((a, b), key=lambda sample: len(sample.ids))
    is_target = long.is_target.copy()
    is_target[: len(short.ids)] |= short.is_target
    return replace(long, is_target=is_target)
