"""A target of bytes or KL: what is chosen meets it, a neighbour would not, and a capture that goes on keeps it."""

from __future__ import annotations

import importlib

import pytest
import torch
from captures import run

from limbeck.errors import RecipeError, StoreError
from limbeck.objectives.head import Head
from limbeck.recipe import parse_recipe
from limbeck.store.certificate import certify
from limbeck.store.choose import Target, choose
from limbeck.store.manifest import read_manifest
from limbeck.store.quantized import Quantized
from limbeck.store.top_k import Nucleus, TopKCodec

capture_module = importlib.import_module("limbeck.capture")  # `limbeck.capture` is the function
HEAD = Head(torch.randn(60, 8, generator=torch.Generator().manual_seed(1)))


def rows(seed, count=40):
    return [torch.randn(count, 8, generator=torch.Generator().manual_seed(seed + i)) * 1.5 for i in range(8)]


FITTED, OTHERS = rows(10), rows(90)


def measured(codec):
    return certify(codec, HEAD, codec.calibrate(HEAD, FITTED), OTHERS)


@pytest.mark.parametrize("codec", [TopKCodec(), Nucleus(k=60)])
def test_as_little_as_meets_a_kl(codec):
    found, _ = choose(codec, Target(kl=0.1), HEAD, FITTED, OTHERS)
    value = getattr(found, found.tuned)
    below = max(other for other in found.ladder if other < value)
    assert measured(found)["kl"] <= 0.1 < measured(found.model_copy(update={found.tuned: below}))["kl"]


@pytest.mark.parametrize(("codec", "wanted"), [(TopKCodec(), 20.0), (Quantized(), 6.0)])
def test_as_much_as_fits_into_bytes(codec, wanted):
    found, model = choose(codec, Target(bytes_per_token=wanted), HEAD, FITTED, OTHERS)
    size = certify(found, HEAD, model, OTHERS)["bytes_per_token"]
    assert 0.8 * wanted < size <= wanted


@pytest.mark.parametrize(
    ("codec", "target", "message"),
    [
        (Nucleus(k=2), Target(kl=1e-6), r"target_kl: found a KL of at most 1e-06, expected what .* nucleus with mass = 0\.99.*, KL 0\."),
        (TopKCodec(), Target(bytes_per_token=1.01), r"bytes_per_token: found at most 1\.01 bytes .* topk with k = 1: measured \d"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(codec, target, message):
    with pytest.raises(StoreError, match=message):
        choose(codec, target, HEAD, FITTED, OTHERS)


def test_nothing_to_measure_on():
    with pytest.raises(StoreError, match="too few conversations to measure on"):
        choose(TopKCodec(), Target(kl=0.1), HEAD, FITTED, [])


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        ({"target_kl": 0.1, "bytes_per_token": 64}, "found both target_kl and bytes_per_token"),
        (
            {"target_kl": 0.1, "codec": {"type": "exact"}},
            "codec 'exact' has nothing to choose; set capture.codec to one that has: .*quantized",
        ),
        ({"bytes_per_token": 64, "codec": {"type": "topk", "k": 5}}, r"found both bytes_per_token and codec\.k = 5"),
    ],
)
def test_contradictions_are_refused(base, capture, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**base, "capture": {"path": "store", **capture}})


def test_the_choice_is_in_the_manifest_and_is_kept(base, tmp_path, monkeypatch):
    path, target = tmp_path / "store", "capture.bytes_per_token=30"
    manifest = run(base, path, target, "capture.calibrate_on=3")
    assert manifest.codec.type == "quantized" and manifest.target == {"kl": None, "bytes_per_token": 30.0}
    assert manifest.certificate["bytes_per_token"] <= 30
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    (path / "shard-00001.parquet").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "choose", lambda *args: pytest.fail("chose again"))
        capture_module.repair(base, [f"capture.path={path}", target, "capture.calibrate_on=3"])
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    # the chosen codec, written out, is the same capture; another target is another one
    run(base, path, f"capture.codec={{type: quantized, bytes_per_token: {manifest.codec.bytes_per_token}}}")
    with pytest.raises(StoreError, match=r"holds another capture: target is .*30\.0.* this recipe needs .*25\.0"):
        run(base, path, "capture.bytes_per_token=25")
    with pytest.raises(StoreError, match="holds another capture: codec is"):
        run(base, path, target, "capture.codec.type=topk")
    assert read_manifest(path).codec == manifest.codec
