"""Teachers in 8 and 4 bits: near the full one, smaller, the same for any batch, and captured as the other teacher that they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from helpers import SENTENCES, write_jsonl
from limbeck.errors import StoreError
from limbeck.objectives.base import Needs
from limbeck.recipe import check_files, parse_recipe
from limbeck.store.manifest import read_manifest
from limbeck.teachers import ModelTeacher
from limbeck.teachers import model as teacher_module
from limbeck.tokens.datasets import read_conversations
from limbeck.tokens.pack import pack
from limbeck.tokens.pad import collate, pad
from limbeck.tokens.render import render_all


@pytest.fixture
def tree(make_model_dir: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "student": {"model": str(make_model_dir(layers=2, seed=1))},
        "teacher": {"type": "model", "model": str(make_model_dir(width=64)), "load_in": "4bit"},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in SENTENCES]))},
        "objective": [{"type": "logits"}, {"type": "hidden"}],
        "train": {"steps": 3, "pack_length": 80, "optimizer": {"learning_rate": 0.01}},
    }


def test_missing_package_is_named_with_the_command(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "find_spec", lambda name: None)
    expected = "teacher.load_in: 'bitsandbytes' is not installed; expected its package: pip install 'limbeck[quantized]'"
    assert check_files(parse_recipe(tree)) == [expected]


@pytest.mark.parametrize(("load_in", "nearness", "size"), [("8bit", 0.02, 1), ("4bit", 0.3, 0.5)])
def test_low_bits_are_near_and_small_and_know_no_batch(
    tree: dict[str, Any], load_in: Any, nearness: float, size: float, tokenizer: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    samples = render_all(read_conversations(Path(tree["source"]["data"])), tokenizer, 64)[0]
    full, low = (ModelTeacher(model=tree["teacher"]["model"], load_in=bits).open(tokenizer, Needs(output=True)) for bits in (None, load_in))
    batch = pad(samples, 2)
    p, q = (scorer.head(scorer.score(batch).output).log_softmax(-1) for scorer in (full, low))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert 0 < kl < nearness
    weight = low.model.model.layers[0].mlp.up_proj.weight
    assert weight.nbytes == size * 64 * 128 and not weight.requires_grad
    packed = collate(pack(samples, 80), 2)
    ids = [each.sample_ids.flatten()[each.scored] for each in (batch, packed)]
    rows = [low.score(each).output for each in (batch, packed)]
    for sample in samples:
        ours, theirs = (row[of == sample.sample_id] for row, of in zip(rows, ids, strict=True))
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_distilling_from_four_bits(tree: dict[str, Any], tmp_path: Path) -> None:
    """Live, then from a capture: the same losses. The capture says what it is of, and another is refused."""
    pytest.importorskip("bitsandbytes")
    live = limbeck.train(tree, tmp_path / "live")
    losses = [row["loss"] for row in live.metrics()]
    assert losses[-1] < losses[0]
    store = tmp_path / "store"
    captured = {**tree, "capture": {"path": str(store)}}
    limbeck.capture(captured)
    assert read_manifest(store).teacher.load_in == "4bit"
    offline = limbeck.train({**tree, "teacher": {"type": "store", "path": str(store)}}, tmp_path / "offline")
    assert [row["loss"] for row in offline.metrics()] == pytest.approx(losses, rel=1e-3)
    with pytest.raises(StoreError, match=r"teacher\.load_in is '4bit', this recipe needs None"):
        limbeck.capture(captured, ["teacher.load_in=null"])
