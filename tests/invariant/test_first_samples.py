"""Hidden terms that begin with what the data says: the same map and projections in every run, kept where it is stopped, lost nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from helpers import SENTENCES, save_model, tiny_model, write_jsonl
from limbeck.errors import RecipeError
from limbeck.first_samples import FirstSamples, samples_of
from limbeck.models import blocks
from limbeck.objectives.base import Needs
from limbeck.student import prune
from limbeck.teachers import ModelTeacher

OTHER_WIDTH = {"layers": 3, "width": 48, "seed": 2}


@pytest.fixture(scope="module")
def base(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", [{"text": text} for text in SENTENCES])
    return {
        "student": {"model": str(make_model_dir(layers=2, seed=1))},
        "teacher": {"type": "model", "model": str(make_model_dir(**OTHER_WIDTH))},
        "source": {"type": "dataset", "data": str(data)},
        "objective": [{"type": "ce"}, {"type": "hidden", "pairs": "cka", "projection": "ridge"}],
        "train": {"steps": 4, "batch_size": 4, "optimizer": {"learning_rate": 0.003}},
    }


def test_cka_finds_the_blocks_that_a_student_was_cut_out_of(base: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """A student of its teacher's first blocks has their very states: each is mapped to itself, which `uniform` would not do."""
    student = tiny_model(layers=6, seed=3)
    teacher = save_model(tmp_path / "teacher", student, tokenizer)
    prune(student, [0, 1, 2])
    recipe = {
        **base,
        "student": {"model": str(save_model(tmp_path / "student", student, tokenizer))},
        "teacher": {"type": "model", "model": str(teacher)},
        "objective": [{"type": "hidden", "pairs": "cka", "num_pairs": 2}],
    }
    run = limbeck.train(recipe, tmp_path / "run")
    found = run.read_json("data.json")["layer_maps"]["hidden"]
    assert found["pairs"] == [[0, 0], [2, 2]] and found["student_blocks"] == [0, 2] and found["teacher_blocks"] == [0, 1, 2, 3, 4, 5]
    assert [found["cka"][0][0], found["cka"][1][2]] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert run.metrics()[0]["loss"] < 1e-9


def test_settled_map_is_trained_as_if_it_had_been_written(base: dict[str, Any], tmp_path: Path) -> None:
    found = limbeck.train(base, tmp_path / "found")
    pairs = found.read_json("data.json")["layer_maps"]["hidden"]["pairs"]
    written = limbeck.train(
        {**base, "objective": [{"type": "ce"}, {"type": "hidden", "pairs": pairs, "projection": "ridge"}]}, tmp_path / "w"
    )
    assert "layer_maps" not in written.read_json("data.json")
    assert [row["loss"] for row in found.metrics()] == [row["loss"] for row in written.metrics()]


def test_two_ranks_find_what_one_finds(base: dict[str, Any], tmp_path: Path) -> None:
    alone = limbeck.train(base, tmp_path / "alone")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(base))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "limbeck", "train", str(file), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    two = limbeck.Run(tmp_path / "two")
    assert two.read_json("data.json") == alone.read_json("data.json")
    assert [row["loss"] for row in two.metrics()] == pytest.approx([row["loss"] for row in alone.metrics()], rel=1e-4)


def test_resumed_run_keeps_its_map(base: dict[str, Any], tmp_path: Path) -> None:
    """Also where this machine would find another: the map is read from the run."""
    settings = ["train.checkpoint_every=2"]
    straight = limbeck.train(base, tmp_path / "straight", settings)
    changed = straight.read_json("data.json")
    changed["layer_maps"]["hidden"]["pairs"] = [[0, 0], [1, 0]]
    straight.write_json("data.json", changed)
    straight.write_json("run.json", {"status": "running"})
    again = limbeck.train(base, tmp_path / "straight", settings)
    assert again.read_json("data.json")["layer_maps"]["hidden"]["pairs"] == [[0, 0], [1, 0]]


@pytest.mark.parametrize("normalize", ["layer_norm", "none"])
def test_ridge_begins_lower_than_a_random_projection(base: dict[str, Any], normalize: str, tmp_path: Path) -> None:
    first = {}
    for projection in ("random", "orthogonal", "ridge"):
        term = {"type": "hidden", "projection": projection, "normalize": normalize}
        first[projection] = limbeck.train({**base, "objective": [term]}, tmp_path / projection, ["train.steps=1"]).metrics()[0]["loss"]
    assert first["ridge"] < 0.5 * min(first["random"], first["orthogonal"])


def test_projection_asked_for_by_name_is_made_where_widths_are_equal(base: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """A teacher of the student's width that is another model: the ridge regression brings them nearer than no projection does."""
    recipe = {**base, "teacher": {"type": "model", "model": base["student"]["model"]}, "student": {"model": str(tmp_path / "student")}}
    save_model(tmp_path / "student", tiny_model(layers=2, seed=5), tokenizer)
    first, shapes = {}, {}
    for projection in ("random", "orthogonal", "ridge"):
        term = {"type": "hidden", "projection": projection}
        run = limbeck.train({**recipe, "objective": [term]}, tmp_path / projection, ["train.steps=1", "train.checkpoint_every=1"])
        first[projection] = run.metrics()[0]["loss"]
        (held,) = run.path.glob("checkpoints/*/learner.safetensors")
        shapes[projection] = {tuple(value.shape) for name, value in load_file(held).items() if name.startswith("projections.")}
    assert shapes == {"random": set(), "orthogonal": {(32, 32)}, "ridge": {(32, 32)}}
    assert first["ridge"] < 0.7 * min(first["random"], first["orthogonal"])


def test_calibration_runs_nothing_until_asked_and_takes_each_sample_once(base: dict[str, Any], tokenizer: Any) -> None:
    recipe = limbeck.parse_recipe(base)
    source = recipe.source.open(tokenizer, 0)
    assert sorted(sample.sample_id for sample in samples_of(source)) == sorted(sample.sample_id for sample in source.samples)
    FirstSamples(None, None, source, "cpu")
    student = tiny_model(layers=2, seed=1)
    states = FirstSamples(student, ModelTeacher(model=recipe.teacher.model).open(tokenizer, Needs(layers=frozenset({1}))), source, "cpu")
    total = sum(len(sample.ids) for sample in source.samples)
    assert {block: tuple(rows.shape) for block, rows in states.student.items()} == {0: (total, 32), 1: (total, 32)}
    assert {block: tuple(rows.shape) for block, rows in states.teacher.items()} == {1: (total, 48)}
    assert len(blocks(student)) == 2 and not any(rows.requires_grad for rows in states.student.values())


def test_map_that_asks_for_more_blocks_than_there_are_is_refused_with_the_recipe(base: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"objective.hidden.num_pairs: found 3, expected at most 2"):
        limbeck.parse_recipe({**base, "objective": [{"type": "hidden", "pairs": "cka", "num_pairs": 3}]})


def test_orthogonal_projection_keeps_angles() -> None:
    from limbeck.objectives import Hidden

    (linear,) = Hidden(projection="orthogonal").projections(1, 16, 24, torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear.weight.T @ linear.weight, torch.eye(16), rtol=1e-4, atol=1e-5)
