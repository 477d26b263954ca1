"""The learning rate of every step, worked out by hand, and which weights decay."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from helpers import tiny_model
from limbeck.learner import Learner
from limbeck.objectives import CrossEntropy
from limbeck.optim import Optimizer, build


def rates(num_steps, **settings):
    spec = Optimizer(learning_rate=settings.pop("learning_rate", 1.0), **settings)
    return [spec.rate(step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule):
    assert rates(20, schedule=schedule, warmup_fraction=0.2)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine():
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    assert rates(5, schedule="cosine", warmup_fraction=0.0, final_fraction=0.1) == pytest.approx(expected)
    # half-way between peak and end in the middle, whatever the warm-up
    assert rates(11, schedule="cosine", warmup_fraction=0.1, final_fraction=0.1)[1:] == pytest.approx(
        [1.0, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 9)) for i in range(1, 9)), 0.1]
    )


def test_linear():
    assert rates(5, schedule="linear", warmup_fraction=0.0, final_fraction=0.0) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert rates(6, schedule="linear", warmup_fraction=0.3, final_fraction=0.4) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])


def test_constant():
    assert rates(4, schedule="constant", warmup_fraction=0.5, final_fraction=0.0) == [0.5, 1.0, 1.0, 1.0]


def test_warmup_stable_decay():
    found = rates(10, schedule="wsd", warmup_fraction=0.2, decay_fraction=0.5, final_fraction=0.2)
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.84, 0.68, 0.52, 0.36, 0.2])


def test_warmup_and_decay_that_overlap():
    assert rates(4, schedule="wsd", warmup_fraction=0.5, decay_fraction=1.0, final_fraction=0.0) == pytest.approx([0.5, 1.0, 1.0, 0.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("num_steps", [2, 3, 7, 40, 1001])
def test_the_last_step_is_at_the_final_fraction_and_no_step_leaves_the_range(schedule, num_steps):
    found = rates(num_steps, schedule=schedule, warmup_fraction=0.1, decay_fraction=0.6, final_fraction=0.1, learning_rate=2e-4)
    assert found[-1] == pytest.approx(2e-5)
    assert max(found) == pytest.approx(2e-4)
    assert all(0 < rate <= 2e-4 for rate in found)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.99])
def test_one_step_is_a_run_too(schedule, warmup):
    assert rates(1, schedule=schedule, warmup_fraction=warmup) == [1.0]


def test_all_steps_but_one_can_warm_up():
    assert rates(4, schedule="cosine", warmup_fraction=0.99) == [0.25, 0.5, 0.75, 1.0]


def test_a_rate_depends_on_its_step_alone():
    spec = Optimizer(warmup_fraction=0.2)
    forwards = [spec.rate(step, 30) for step in range(30)]
    assert [spec.rate(step, 30) for step in reversed(range(30))] == forwards[::-1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0),
        ("learning_rate", -1e-4),
        ("learning_rate", "inf"),
        ("betas", [0.9]),
        ("betas", [0.9, 1.0]),
        ("betas", [-0.1, 0.9]),
        ("betas", [2, 3]),
        ("epsilon", 0),
        ("weight_decay", -1),
        ("max_grad_norm", 0),
        ("schedule", "exponential"),
        ("warmup_fraction", 1.0),
        ("warmup_fraction", -0.1),
        ("decay_fraction", 0),
        ("final_fraction", 1.1),
    ],
)
def test_settings_that_make_no_sense(key, value):
    with pytest.raises(ValidationError, match=key):
        Optimizer(**{key: value})


def test_settings_at_the_edge_make_sense():
    Optimizer(betas=[0, 0.999], weight_decay=0, max_grad_norm=None, warmup_fraction=0, decay_fraction=1, final_fraction=0)


# ---- groups


def test_matrices_decay_and_vectors_do_not():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 2))
    linear, norm, embedding = module
    decayed, kept = build(Optimizer(weight_decay=0.1, learning_rate=1e-3, betas=(0.8, 0.9), epsilon=1e-7), module).param_groups
    assert [id(p) for p in decayed["params"]] == [id(linear.weight), id(embedding.weight)]
    assert [id(p) for p in kept["params"]] == [id(linear.bias), id(norm.weight), id(norm.bias)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    for group in (decayed, kept):
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.9), 1e-7)


def test_decay_shrinks_a_matrix_and_leaves_a_vector():
    module = nn.Linear(2, 2)
    nn.init.ones_(module.weight)
    nn.init.ones_(module.bias)
    optimizer = build(Optimizer(weight_decay=0.5, learning_rate=0.1), module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(module.weight, torch.full((2, 2), 0.95))
    assert torch.equal(module.bias, torch.ones(2))


def test_frozen_and_tied_weights_are_given_once_or_not_at_all():
    learner = Learner(tiny_model(tied=True, layers=1), {"ce": CrossEntropy()}, vocabulary=10)
    learner.student.model.norm.weight.requires_grad_(False)
    given = [p for group in build(Optimizer(), learner).param_groups for p in group["params"]]
    assert len({id(p) for p in given}) == len(given)
    assert {id(p) for p in given} == {id(p) for p in learner.parameters()} - {id(learner.student.model.norm.weight)}


def test_a_module_of_matrices_only_has_one_group():
    assert len(build(Optimizer(), nn.Linear(2, 2, bias=False)).param_groups) == 1


# ---- steps


def test_steps_are_those_of_the_definition():
    """Decoupled weight decay (1711.05101), in float64 from the formulas; sizes that fill no vector register evenly."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(7, 13, generator=generator), torch.randn(13, generator=generator)]
    gradients = [[torch.randn(weight.shape, generator=generator) for weight in weights] for _ in range(3)]
    module = nn.ParameterList([weight.clone() for weight in weights])
    rate, (b1, b2), epsilon, decay = 0.1, (0.8, 0.9), 1e-3, 0.2
    optimizer = build(Optimizer(learning_rate=rate, betas=(b1, b2), epsilon=epsilon, weight_decay=decay), module)
    for its in gradients:
        for parameter, gradient in zip(module, its, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for number, weight in enumerate(weights):
        exact, mean, square = weight.double(), 0.0, 0.0
        for step, its in enumerate(gradients, 1):
            gradient = its[number].double()
            mean, square = b1 * mean + (1 - b1) * gradient, b2 * square + (1 - b2) * gradient**2
            exact = exact * (1 - rate * decay * (weight.ndim >= 2))
            exact = exact - rate * (mean / (1 - b1**step)) / ((square / (1 - b2**step)).sqrt() + epsilon)
        assert torch.allclose(module[number].double(), exact, rtol=0, atol=1e-6)
