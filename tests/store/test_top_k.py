"""Codecs that keep the most probable tokens: what comes back, to a step, and what is made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captures import coded_apart, run, samples_of

from limbeck.errors import RecipeError
from limbeck.objectives.base import Needs
from limbeck.objectives.head import Head
from limbeck.objectives.support import SpreadTarget, TopKTarget
from limbeck.recipe import parse_recipe
from limbeck.spec import validate
from limbeck.store import entropy
from limbeck.store.codec import Codec
from limbeck.store.manifest import read_manifest
from limbeck.store.sampled import SampledCodec
from limbeck.store.top_k import LOWEST, Nucleus, TopKCodec
from limbeck.teachers import StoreTeacher
from limbeck.tokens.pad import pad

V, E = 83, 12
HEAD = Head(torch.randn(V, E, generator=torch.Generator().manual_seed(1)), 2 * torch.randn(V, generator=torch.Generator().manual_seed(2)))


def outputs(rows, seed):
    return torch.randn(rows, E, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 1.5, rows)[:, None]


def kept(codec, rows, seed=0):
    model = codec.calibrate(HEAD, [outputs(150, seed=8), outputs(60, seed=9)])
    blobs = codec.encode(HEAD, model, rows, [len(rows)])
    return codec.decode(None, model, blobs, [np.arange(len(rows))]).sparse, model


def target(top):
    found = TopKTarget(top.ids, top.log_probs, top.log_tails)
    return SpreadTarget(found, top.log_priors) if top.log_priors else found


def test_symbols_come_back_also_those_never_counted():
    table = entropy.table_of(np.array([1000, 0, 3, 0]))
    one = entropy.table_of(np.array([7]))
    parts = [(np.array([0, 0, 1, 3, 2, 0]), table), (np.zeros(50, int), one), (np.array([3]), table)]
    reader = entropy.Reader(entropy.write(parts))
    assert all((reader.take(its, len(symbols)) == symbols).all() for symbols, its in parts)
    assert len(entropy.write([(np.zeros(10_000, int), table)])) < 30, "what is certain costs next to nothing"


@pytest.mark.parametrize("step", [0.5, 1 / 16])
@pytest.mark.parametrize("prior", [False, True])
def test_the_most_probable_tokens_come_back_within_a_step(step, prior):
    rows = outputs(40, seed=2)
    temperatures = (1.0, 2.0, 4.0)
    top, _ = kept(TopKCodec(k=9, step=step, temperatures=temperatures, prior=prior), rows)
    logits = HEAD(rows).double()
    log_probs, ids = torch.log_softmax(logits, -1).topk(9)
    assert torch.equal(top.ids, ids) and (top.log_probs - log_probs).abs().max() <= step * 1.001
    for temperature in temperatures:
        tail = torch.log_softmax(logits / temperature, -1).scatter(-1, ids, -torch.inf).logsumexp(-1)
        assert (top.log_tails[temperature] - tail).abs().max() <= step * 1.001
        total = target(top).log_probs(temperature).exp().sum(-1)
        torch.testing.assert_close(total, torch.ones(40), rtol=0, atol=1e-5)
    assert (top.log_priors is not None) == prior


def test_a_nucleus_holds_its_mass_in_as_few_tokens_as_can_be():
    rows = outputs(60, seed=3)
    top, _ = kept(Nucleus(mass=0.8, k=20), rows)
    exact = torch.softmax(HEAD(rows), -1).sort(-1, descending=True).values.cumsum(-1)
    counts = ((exact < 0.8).sum(-1) + 1).clamp(max=20)
    is_kept = torch.isfinite(top.log_probs)
    assert torch.equal(is_kept.sum(1), counts) and top.ids.shape[1] == counts.max() and counts.unique().numel() > 3
    assert (top.ids == top.ids[:, :1])[~is_kept].all(), "padding repeats an id of its row"
    torch.testing.assert_close(target(top).log_probs().exp().sum(-1), torch.ones(60), rtol=0, atol=1e-5)


def test_all_tokens_are_the_teacher_itself():
    rows = outputs(30, seed=4)
    top, _ = kept(TopKCodec(k=200, step=1 / 512), rows)
    exact = torch.log_softmax(HEAD(rows), -1)
    assert (target(top).log_probs() - exact)[exact > LOWEST].abs().max() < 1 / 256


def test_a_prior_is_nearer_to_the_teacher_than_an_even_tail():
    rows = outputs(200, seed=5)
    exact = torch.log_softmax(HEAD(rows), -1)
    top, _ = kept(TopKCodec(k=4), rows)
    even = SpreadTarget(TopKTarget(top.ids, top.log_probs, top.log_tails), {1.0: torch.zeros(V)})
    ours, theirs = ((exact.exp() * (exact - each.log_probs())).sum(-1).mean() for each in (target(top), even))
    assert 0 < ours < theirs


@pytest.mark.parametrize("codec", [TopKCodec(k=6), Nucleus(mass=0.7, k=30)])
def test_a_samples_bytes_depend_on_its_rows_alone(codec):
    rows = outputs(300, seed=6)
    model = codec.calibrate(HEAD, [outputs(150, seed=8)])
    some, everything = (each.sparse for each in coded_apart(codec, HEAD, model, rows))
    assert torch.equal(some.log_probs, everything.log_probs[[69, 5, 78], : some.ids.shape[1]])
    assert len(codec.decode(None, model, [], []).sparse.ids) == 0


def test_settings_without_sense_are_refused():
    for temperatures in ([2.0], [1.0, 1.0], [1.0, -1.0]):
        with pytest.raises(RecipeError, match="temperatures"):
            validate(Codec.members["topk"], {"type": "topk", "temperatures": temperatures}, "capture.codec")


@pytest.mark.parametrize("codec", ["{type: topk, k: 8, temperatures: [1, 2]}", "{type: nucleus, mass: 0.5, k: 30, prior: false}"])
def test_a_capture_keeps_them(base, captured, data, tokenizer, tmp_path, codec):
    path = tmp_path / "store"
    manifest = run(base, path, f"capture.codec={codec}", "capture.calibrate_on=3")
    assert manifest.head is None and manifest.model is not None and read_manifest(path).temperatures == manifest.codec.temperatures
    batch = pad(samples_of(data, tokenizer)[:3], 0)
    needs = Needs(output=True)
    signal = StoreTeacher(path=str(path)).open(tokenizer, needs).score(batch)
    exact = StoreTeacher(path=str(captured)).open(tokenizer, needs).score(batch)
    log_probs = torch.log_softmax(exact.teacher_head(exact.output).float(), -1)
    found = log_probs.gather(-1, signal.sparse.ids)
    is_kept = torch.isfinite(signal.sparse.log_probs)
    assert (found - signal.sparse.log_probs)[is_kept].abs().max() <= manifest.codec.step


def test_a_temperature_that_was_not_kept_is_refused_with_the_recipe(base, tmp_path):
    """Before anything is loaded, and not at the first step."""
    path = tmp_path / "store"
    run(base, path, "capture.codec={type: topk, k: 8, temperatures: [1, 2]}", "capture.calibrate_on=3")
    student = {"model": base["teacher"]["model"]}
    recipe = {"student": student, "teacher": {"type": "store", "path": str(path)}, "source": {"type": "dataset", "data": "any"}}
    parse_recipe(recipe | {"objective": [{"type": "logits", "temperature": 2.0}]})
    with pytest.raises(RecipeError, match=r"'logits' term: found temperature 3, .*: 1 or 2; .*with 3 in capture\.codec\.temperatures"):
        parse_recipe(recipe | {"objective": [{"type": "logits", "temperature": 3.0}]})


@pytest.mark.parametrize("codec", [TopKCodec(k=5), Nucleus(k=5), SampledCodec(draws=9, k=2)])
def test_short_samples_share_the_work_of_the_head(codec):
    """Ten samples of 9 rows are one block of logits, and not ten that are filled up."""
    calls = []

    class Counted(Head):
        def __call__(self, rows, out=None):
            calls.append(len(rows))
            return super().__call__(rows, out)

    head, rows = Counted(HEAD.weight, HEAD.bias), outputs(90, seed=2)
    model = codec.calibrate(HEAD, [rows, rows[:0]])
    blobs = codec.encode(head, model, rows, [9] * 10)
    assert calls == [128]
    assert blobs == [codec.encode(head, model, part, [9])[0] for part in rows.split(9)]
