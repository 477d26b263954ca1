"""Layer maps and first projections, against their definitions in float64."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch

from limbeck.objectives import layer_map
from limbeck.objectives.layer_map import linear_cka, ridge, rising_path


def _states(count: int, rows: int, width: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator) * (1 + 10 * i) + i for i in range(count)]


def test_cka_is_its_definition() -> None:
    ours, theirs = _states(2, 40, 6, 0), _states(3, 40, 9, 1)
    theirs[1] = theirs[1] + torch.cat([ours[0], ours[0][:, :3]], dim=1)
    found = linear_cka(ours, theirs)
    for i, x in enumerate(ours):
        for j, y in enumerate(theirs):
            xc, yc = (each.double() - each.double().mean(0) for each in (x, y))
            expected = (yc.T @ xc).norm() ** 2 / ((xc.T @ xc).norm() * (yc.T @ yc).norm())
            assert found[i, j].item() == pytest.approx(expected.item(), rel=1e-4)


def test_cka_knows_no_rotation_scale_or_shift() -> None:
    (x,) = _states(1, 50, 8, 0)
    rotation = torch.linalg.qr(_states(1, 8, 8, 2)[0])[0]
    assert linear_cka([x], [3 * x @ rotation + 7]).item() == pytest.approx(1.0, abs=1e-5)


def test_cka_of_many_tokens_takes_some_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = _states(1, 100, 4, 0), _states(1, 100, 5, 1)
    monkeypatch.setattr(layer_map, "MAX_TOKENS", 30)
    assert torch.equal(linear_cka(ours, theirs), linear_cka([ours[0][::4]], [theirs[0][::4]]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 5), (5, 3), (4, 1)])
def test_path_is_the_best_of_those_that_never_go_back(rows: int, columns: int, seed: int) -> None:
    similarity = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    paths = list(combinations_with_replacement(range(columns), rows))
    best = max(paths, key=lambda path: sum(similarity[row, column].item() for row, column in enumerate(path)))
    assert rising_path(similarity) == list(best)


def test_ridge_has_no_gradient_at_its_solution() -> None:
    (x,), (y,) = _states(1, 60, 5, 0), _states(1, 60, 7, 1)
    weight = ridge(x, y, 0.1).double().requires_grad_()
    strength = 0.1 * x.double().square().sum(0).mean()
    loss = (x.double() @ weight.T - y.double()).square().sum() + strength * weight.square().sum()
    loss.backward()
    assert weight.shape == (7, 5) and weight.grad.abs().max() < 1e-3 * y.abs().sum()
