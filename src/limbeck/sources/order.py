"""Which sample stands at a position of the endless sequence that training walks: a pure function of the seed and the position.

It knows neither steps, batches nor processes, and needs no earlier position to answer for a later one; a resume asks and goes on.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol


class Order(Protocol):
    """A sequence of sample numbers."""

    def at(self, position: int) -> int:
        """The number of the sample at a position."""
        ...

    @property
    def epoch(self) -> int:
        """Positions after which every sample was given once."""
        ...


class Shuffled:
    """Epochs over `size` samples, each shuffled anew."""

    def __init__(self, size: int, seed: int, stream: int = 0) -> None:
        self.epoch, self._seed, self._stream = size, seed, stream
        self._orders: dict[int, list[int]] = {}

    def at(self, position: int) -> int:
        number, place = divmod(position, self.epoch)
        if number not in self._orders:
            import numpy as np

            self._orders = {old: order for old, order in self._orders.items() if old == number - 1}
            self._orders[number] = np.random.default_rng([self._seed, number, self._stream]).permutation(self.epoch).tolist()
        return self._orders[number][place]


class Mixed:
    """Several data sets, interleaved as evenly as their weights allow; each is shuffled and repeated on its own.

    The first set takes every position at which `floor(position * share + phase)` rises, share being its part of the weights; the others
    divide the remaining positions in the same way. So after any number of positions each has had its share of them to within one per set.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        import numpy as np

        self.sizes = list(sizes)
        self._sets = [Shuffled(size, seed, 1 + number) for number, size in enumerate(sizes)]
        self._starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self._shares = [weight / math.fsum(weights[number:]) for number, weight in enumerate(weights[:-1])]
        self._phases = np.random.default_rng([seed, 2**32]).random(len(self._shares)).tolist()

    def at(self, position: int) -> int:
        left = position
        for number, (share, phase) in enumerate(zip(self._shares, self._phases, strict=True)):
            before = math.floor(left * share + phase)
            if math.floor((left + 1) * share + phase) > before:
                return self._starts[number] + self._sets[number].at(before)
            left -= before
        return self._starts[-1] + self._sets[-1].at(left)

    def counts(self, positions: int) -> list[int]:
        """How many of the first positions each set has."""
        taken, left = [], positions
        for share, phase in zip(self._shares, self._phases, strict=True):
            taken.append(math.floor(left * share + phase))
            left -= taken[-1]
        return [*taken, left]

    @property
    def epoch(self) -> int:
        """Small sets have begun again by then."""

        def is_through(positions: int) -> bool:
            return all(count >= size for count, size in zip(self.counts(positions), self.sizes, strict=True))

        enough = sum(self.sizes)
        while not is_through(enough):
            enough *= 2
        return bisect_left(range(enough), True, key=is_through)
