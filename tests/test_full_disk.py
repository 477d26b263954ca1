"""A system that takes no more bytes, as a full disk does: one message, nothing half-written, and the same command goes on later.
Checkpoints have theirs in test_checkpoint.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import limbeck
from helpers import exit_code, forked, write_jsonl
from limbeck.store.manifest import read_manifest
from limbeck.store.verify import verify


@pytest.fixture(scope="module")
def recipe(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = [{"prompt": f"Add {n} and {n}.", "completion": f" The answer is {2 * n}."} for n in range(6)]
    data = str(write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows))
    return {
        "student": {"model": str(make_model_dir(layers=1, seed=1))},
        "teacher": {"type": "model", "model": str(make_model_dir(layers=2, seed=2))},
        "source": {"type": "dataset", "data": data},
        "objective": [{"type": "ce"}],
        "train": {"steps": 12, "batch_size": 1},
        "evaluate": [{"type": "bits_per_byte", "data": data, "batch_size": 1}],
        "capture": {"path": "unset", "layers": [0, 1], "samples_per_shard": 2, "batch_size": 1},
    }


def refused(arguments: list[str], folder: Path, largest: int) -> str:
    log = folder / f"log-{largest}.txt"
    assert exit_code(forked(arguments, log, largest, LIMBECK_CACHE=str(folder / "cache"))) == 2, log.read_text()
    text = log.read_text()
    assert "Traceback" not in text and "too large" in text, text
    assert not [file for file in folder.rglob("*") if ".tmp" in file.name and "cache" not in file.parts]
    return text


def write(recipe: dict[str, Any], folder: Path) -> str:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return str(folder / "recipe.yaml")


@pytest.mark.parametrize(("largest", "named"), [(2_500, "metrics.jsonl"), (30_000, "student")])
def test_training(recipe: dict[str, Any], tmp_path: Path, largest: int, named: str) -> None:
    arguments = ["train", write({**recipe, "capture": None}, tmp_path), "--out", str(tmp_path / "run")]
    assert named in refused(arguments, tmp_path, largest)
    assert exit_code(forked(arguments, tmp_path / "log.txt")) == 0
    assert [row["step"] for row in limbeck.Run(tmp_path / "run").metrics()] == list(range(1, 13))


@pytest.mark.parametrize(("largest", "named"), [(800, "manifest"), (6_000, "shard-00000.parquet"), (30_000, "head.safetensors")])
def test_captures(recipe: dict[str, Any], tmp_path: Path, largest: int, named: str) -> None:
    if named.startswith("shard"):  # a codec without a head, which is larger
        recipe = {**recipe, "capture": {**recipe["capture"], "codec": {"type": "topk", "k": 64}, "samples_per_shard": 6}}
    arguments = ["capture", write(recipe, tmp_path), "--out", str(tmp_path / "store")]
    assert "could not be written" in refused(arguments, tmp_path, largest)
    assert exit_code(forked(arguments, tmp_path / "log.txt")) == 0
    assert verify(tmp_path / "store").num_missing == 0 == read_manifest(tmp_path / "store").num_missing


def test_evaluation(recipe: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["eval", recipe["student"]["model"], "--recipe", write(recipe, tmp_path), "--out", str(tmp_path / "out")]
    assert "bits_per_byte.partial.jsonl" in refused(arguments, tmp_path, 1_200)
    assert exit_code(forked(arguments, tmp_path / "log.txt")) == 0
    assert len(limbeck.Run(tmp_path / "out").evals()["bits_per_byte"]["items"]) == 6
