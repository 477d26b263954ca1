"""Which blocks of two models do the same, and the linear map between their states: what a hidden term takes from a calibration batch.

Pure functions of states at the same tokens, in float32. x is the student's, y the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MAX_TOKENS = 2048
"""Of a similarity, which needs 16 MB for each of the teacher's blocks then."""


def linear_cka(x: Sequence[Float[Tensor, "r d"]], y: Sequence[Float[Tensor, "r e"]]) -> Float[Tensor, "s t"]:
    """Linear centred kernel alignment of each x with each y (1905.00414), from 0 to 1.

    ||Yc' Xc||_F^2 / (||Xc' Xc||_F ||Yc' Yc||_F), by way of the tokens' inner products `[r, r]`: widths may differ, and any number of
    pairs costs little more than one. It is biased towards 1 where tokens are not many more than features.
    Of many tokens, MAX_TOKENS evenly spaced ones are taken.
    """
    import torch

    step = -(-len(x[0]) // MAX_TOKENS)
    x, y = ([each[::step] for each in states] for states in (x, y))

    theirs = torch.stack([_products(states) for states in y])
    similarity: Tensor = torch.stack([theirs @ _products(states) for states in x])
    return similarity


def _products(states: Tensor) -> Tensor:
    """Inner products of centred states, as one vector `[r * r]` of length 1."""
    centred = states.float() - states.float().mean(0)
    products: Tensor = (centred @ centred.T).flatten()
    length: Tensor = products.norm().clamp(min=1e-30)
    return products / length


def rising_path(similarity: Float[Tensor, "s t"]) -> list[int]:
    """A column for each row, never going back, with the largest sum: deeper blocks of the student follow no shallower ones."""
    import torch

    # best[j]: of paths that end in a column up to j
    best, choices = torch.zeros(similarity.shape[1], dtype=torch.float64), []
    for row in similarity.double().cpu():
        values, columns = (best + row).cummax(0)
        choices.append(columns)
        best = values
    path = [similarity.shape[1] - 1]
    for columns in reversed(choices):
        path.append(int(columns[path[-1]]))
    return path[:0:-1]


def ridge(x: Float[Tensor, "r d"], y: Float[Tensor, "r e"], strength: float) -> Float[Tensor, "e d"]:
    """P that minimises ||x P' - y||^2 + c ||P||^2, where c is `strength` times the sum of squares of a feature of x, on average."""
    import torch

    x, y = x.double(), y.double()
    gram = x.T @ x
    gram.diagonal().add_(strength * gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(gram, x.T @ y)
    return solution.T.float()
