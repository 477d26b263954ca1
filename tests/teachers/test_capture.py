"""Captures of a served teacher: those of the live one, whatever happens on the way; what ends goes on, and not with another teacher."""

from __future__ import annotations

import json

import pytest
import torch

import helpers
import limbeck
from helpers import SENTENCES
from limbeck.errors import RecipeError, RunError, StoreError
from limbeck.objectives.base import Needs
from limbeck.recipe import parse_recipe
from limbeck.remeasure import remeasure
from limbeck.store.inspect import lines, summary
from limbeck.store.manifest import read_manifest
from limbeck.teachers import StoreTeacher
from limbeck.tokens.datasets import read_conversations
from limbeck.tokens.pad import pad
from limbeck.tokens.render import render_all

STEP = 1 / 16


@pytest.fixture
def data(write_jsonl):
    return write_jsonl([{"text": f"{sentence} {other}"} for sentence in SENTENCES for other in SENTENCES[:3]])


@pytest.fixture
def recipe(spec, data):
    return {
        "teacher": spec,
        "source": {"type": "dataset", "data": str(data), "max_length": 48},
        "capture": {
            "path": "unused",
            "codec": {"type": "topk", "k": 8, "prior": False},
            "samples_per_shard": 4,
            "batch_size": 2,
            "calibrate_on": 4,
        },
    }


def capture(recipe, path, *overrides):
    return limbeck.capture(recipe, [f"capture.path={path}", *overrides])


def shards(manifest):
    return [shard.sha256 for shard in manifest.shards]


def test_it_is_that_of_the_live_teacher(recipe, teacher_dir, tokenizer, data, tmp_path):
    capture(recipe, tmp_path / "served")
    capture(recipe, tmp_path / "live", f"teacher={{type: model, model: {teacher_dir}}}")
    batch = pad(render_all(read_conversations(data), tokenizer, 48)[0], 0)
    served, live = (StoreTeacher(path=str(tmp_path / name)).open(tokenizer, Needs(output=True)).score(batch) for name in ("served", "live"))
    assert torch.allclose(served.observed, live.observed, atol=2e-3)
    same = (served.sparse.ids == live.sparse.ids).all(1)  # near ties may change places where a sum is another
    assert same.float().mean() > 0.99
    assert (served.sparse.log_probs - live.sparse.log_probs)[same].abs().max() < 2 * STEP
    assert (served.sparse.log_tails[1.0] - live.sparse.log_tails[1.0]).abs().max() < 2 * STEP
    manifest = read_manifest(tmp_path / "served")
    assert (manifest.teacher.name, manifest.teacher.told, manifest.teacher.weights_sha256) == ("tiny-teacher", 8, None)
    assert 0 <= manifest.certificate["kl"] < 0.01 and "gradient_angle" not in manifest.certificate
    shown = dict(lines(summary(tmp_path / "served")))
    assert shown["teacher"] == "tiny-teacher, its weights are not known; it told 8 tokens and the mass of the others"
    again = remeasure(tmp_path / "served", parse_recipe(recipe), 8)
    assert again["kl"] < 0.01 and again["observed_error"] < 5e-3


def test_faults_change_no_byte_of_it(recipe, server, tmp_path, capfd):
    plain = capture(recipe, tmp_path / "plain")
    server.faults.extend([None, 503, "death", "garbage", None, "nan", 429, "other ids", "stall"])
    faulty = capture(recipe, tmp_path / "faulty")
    assert not server.faults and shards(faulty) == shards(plain) and len(plain.shards) > 3
    assert faulty.certificate == plain.certificate


def test_what_a_dead_server_ended_goes_on_where_it_was(recipe, server, tmp_path):
    plain = capture(recipe, tmp_path / "plain")
    num_asked = len(server.asked)
    server.dies_after = 22
    with pytest.raises(RunError, match=r"status 503, for 0.2 seconds .* What was done before stays"):
        capture(recipe, tmp_path / "ended", "teacher.patience_seconds=0.2")
    left = read_manifest(tmp_path / "ended")
    assert 0 < len(left.shards) < len(plain.shards)
    server.dies_after = None
    server.asked.clear()
    assert shards(capture(recipe, tmp_path / "ended")) == shards(plain)
    assert len(server.asked) < num_asked - 8


def test_another_model_behind_the_same_name_is_noticed(recipe, server, tokenizer, tmp_path):
    capture(recipe, tmp_path / "store", "source.limit=9")
    server.model = helpers.tiny_model(seed=4, vocab=len(tokenizer))
    with pytest.raises(StoreError, match="holds another teacher: 'tiny-teacher' now finds the same tokens"):
        capture(recipe, tmp_path / "store")
    with pytest.raises(StoreError, match=r"holds another capture: teacher\.told is 8, this recipe needs 16"):
        capture(recipe, tmp_path / "store", "teacher.k=16")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("capture.codec={type: exact}", "found 'exact', expected topk or nucleus with `prior: false`"),
        ("capture.codec.k=9", "found k 9, expected at most 8, which the teacher tells"),
        ("capture.codec.prior=true", "found prior true, expected false"),
        ("capture.codec.temperatures=[1, 2]", r"found temperatures \[1.0, 2.0\], expected \[1\]"),
        ("capture.layers=[1]", "capture.layers: found 1, expected none of a 'server' teacher"),
    ],
)
def test_what_cannot_be_captured_is_refused_before_anything_is_asked(recipe, server, tmp_path, override, message):
    with pytest.raises(RecipeError, match=message):
        capture(recipe, tmp_path / "store", override)
    assert not server.asked and not (tmp_path / "store").exists()


def test_a_target_is_refused(recipe, tmp_path):
    recipe["capture"] = {"path": "unused", "codec": {"type": "topk", "prior": False}, "target_kl": 0.1}
    with pytest.raises(RecipeError, match="found a target, expected a `k`"):
        capture(recipe, tmp_path / "store")


def test_a_nucleus_is_kept_too(recipe, tmp_path):
    manifest = capture(recipe, tmp_path / "store", "capture.codec={type: nucleus, k: 8, mass: 0.5, prior: false}")
    assert manifest.certificate["mass"] > 0.2


def test_the_key_is_nowhere(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_KEY", "s3cret-key")
    capture(recipe, tmp_path / "store", "teacher.key_variable=TINY_KEY")
    assert all(b"s3cret" not in file.read_bytes() for file in (tmp_path / "store").iterdir())
    assert "s3cret" not in json.dumps(parse_recipe(recipe, ["teacher.key_variable=TINY_KEY"]).to_json())
