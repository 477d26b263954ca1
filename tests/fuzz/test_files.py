"""What Limbeck wrote and somebody altered: manifests and shards of captures, checkpoints, records. It is read as it was, or refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import limbeck
from fuzz import changed, damaged, fuzzed
from helpers import SENTENCES, tiny_model, write_jsonl
from limbeck import checkpoint
from limbeck.batch import Signal
from limbeck.errors import LimbeckError
from limbeck.learner import Learner
from limbeck.objectives import CrossEntropy
from limbeck.objectives.base import Needs
from limbeck.optim import Optimizer, build
from limbeck.report.page import build_report
from limbeck.report.records import RunRecord, read_record, write_record
from limbeck.run import Run
from limbeck.store.verify import damages
from limbeck.teachers import StoreTeacher
from limbeck.tokens.datasets import read_conversations
from limbeck.tokens.pad import pad
from limbeck.tokens.render import render_all

Captured = tuple[Path, list[Any]]
ALL = Needs(output=True, layers=frozenset({1}))


@pytest.fixture(scope="module")
def capture(make_model_dir: Any, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Captured:
    folder = tmp_path_factory.mktemp("capture")
    rows = [{"prompt": sentence[:20], "completion": sentence[20:]} for sentence in SENTENCES]
    data = write_jsonl(folder / "data.jsonl", rows)
    recipe = {
        "teacher": {"type": "model", "model": str(make_model_dir(layers=2, seed=5))},
        "source": {"type": "dataset", "data": str(data), "max_length": 64},
        "capture": {
            "path": str(folder / "store"),
            "layers": [1],
            "samples_per_shard": 3,
            "batch_size": 3,
            "codec": {"type": "topk", "k": 4},
        },
    }
    limbeck.capture(recipe)
    return folder / "store", render_all(read_conversations(data), tokenizer, 64)[0]


def signals(store: Path, samples: list[Any], tokenizer: Any) -> list[Signal]:
    teacher = StoreTeacher(path=str(store))
    teacher.provides()
    scorer = teacher.open(tokenizer, ALL)
    scorer.require(samples)
    return [scorer.score(pad([sample], 0)) for sample in samples]


def assert_same(ours: list[Signal], theirs: list[Signal]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.observed, b.observed) and torch.equal(a.sparse.ids, b.sparse.ids) and torch.equal(a.hidden[1], b.hidden[1])


@fuzzed(60)
@given(data=st.data())
def test_manifests_of_captures(capture: Captured, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Whatever it says, what is read is what was captured, or nothing."""
    store, samples = capture
    copy = tmp_path_factory.getbasetemp() / "fuzzed-store"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy)
    tree = data.draw(changed(json.loads((store / "manifest.json").read_text())))
    (copy / "manifest.json").write_text(json.dumps(tree))
    with suppress(LimbeckError):
        damages(copy)
    with suppress(LimbeckError):
        signals(copy, samples, tokenizer)


@fuzzed(60)
@given(data=st.data())
def test_shards(capture: Captured, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    store, samples = capture
    copy = tmp_path_factory.getbasetemp() / "fuzzed-store"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy)
    name = data.draw(st.sampled_from(sorted(file.name for file in store.iterdir() if file.name != "manifest.json")))
    content = data.draw(damaged((store / name).read_bytes()))
    (copy / name).write_bytes(content)
    try:
        assert_same(signals(copy, samples, tokenizer), signals(store, samples, tokenizer))
    except LimbeckError as error:
        assert name in str(error)


@fuzzed(60)
@given(data=st.data())
def test_shards_with_the_right_checksum(capture: Captured, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """From somebody who can write the manifest too: other values may come of it, but no other exception."""
    store, samples = capture
    copy = tmp_path_factory.getbasetemp() / "fuzzed-store"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy)
    tree = json.loads((store / "manifest.json").read_text())
    shard = data.draw(st.sampled_from(tree["shards"]))
    content = data.draw(damaged((store / shard["name"]).read_bytes()))
    (copy / shard["name"]).write_bytes(content)
    footer = content[-shard["footer_bytes"] :]
    shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    shard |= {"footer_bytes": len(footer), "footer_sha256": hashlib.sha256(footer).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(tree))
    with suppress(LimbeckError):
        signals(copy, samples, tokenizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    learner = Learner(tiny_model(layers=1, vocab=60, width=16), {"ce": CrossEntropy()}, 60)
    optimizer = build(Optimizer(), learner)
    root = tmp_path_factory.mktemp("checkpoints")
    checkpoint.save(root, 3, learner, optimizer, {"tokens": 1, "seconds": 0.5}, 1)
    return root, (learner, optimizer)


@fuzzed(60)
@given(data=st.data())
def test_checkpoints(saved: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    root, pair = saved
    copy = tmp_path_factory.getbasetemp() / "fuzzed-checkpoints"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    (folder,) = copy.iterdir()
    file = folder / data.draw(st.sampled_from(sorted(file.name for file in folder.iterdir())))
    if file.suffix == ".json" and data.draw(st.booleans()):
        file.write_text(json.dumps(data.draw(changed(json.loads(file.read_text())))))
    else:
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    with suppress(LimbeckError):
        assert checkpoint.load_latest(copy, *pair) == {"step": 3, "tokens": 1, "seconds": 0.5}


def record() -> dict[str, Any]:
    item = {"id": "a", "sums": {"accuracy": 1.0}, "counts": {"accuracy": 1.0}}
    metric = {"value": 1.0, "stderr": None, "num_items": 1, "higher_is_better": True, "chance": 0.5}
    result = {"name": "piqa", "version": 1, "settings": {}, "metrics": {"accuracy": metric}, "items": [item], "seconds": 1.0}
    row = {"step": 1, "loss": 2.0, "loss/ce": 2.0, "tokens": 9, "scored_tokens": 4, "seconds": 1.0}
    totals = {"status": "finished", "steps": 1, "tokens": 9, "scored_tokens": 4, "train_seconds": 1.0, "tokens_per_second": 9.0}
    return {
        "format": "limbeck-record",
        "version": 1,
        **{"arm": "sft", "seed": 0, "key": "k", "teacher": "t", "about": {}, "recipe": {"objective": [{"type": "ce"}]}, "totals": totals},
        **{"data": {"num_tokens": 9}, "environment": {"packages": {}}, "metrics": [row], "evals": {"piqa": result}},
    }


@fuzzed(40)
@given(tree=changed(record(), most=1))
def test_records(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed-record.json"
    file.write_text(json.dumps(tree))
    with suppress(LimbeckError):
        found = read_record(file)
        assert isinstance(found, RunRecord)
        write_record(file, found)


@fuzzed(25)
@given(data=st.data())
def test_reports_of_records(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """A study's folder as it came from somewhere else."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed-study"
    shutil.rmtree(folder, ignore_errors=True)
    study = {"format": "limbeck-study", "version": 2, "name": "s", "question": "?", "seeds": [0], "references": False, "baseline": "sft"}
    study |= {"arms": {"sft": {"role": "arm", "parent": None, "seeds": [0]}}, "recipes": {"sft": {"objective": [{"type": "ce"}]}}}
    study |= {"index": {"arms": {"sft": {"0": "r.json"}}, "references": {}, "tuning": {}}, "protocol": None, "amendments": []}
    study, it = (data.draw(changed(study, most=1)), record()) if data.draw(st.booleans()) else (study, data.draw(changed(record(), most=1)))
    Run(folder).write_json("records/.keep", {})
    (folder / "study.json").write_text(json.dumps(study))
    (folder / "records" / "r.json").write_text(json.dumps(it))
    with suppress(LimbeckError):
        build_report(folder)
