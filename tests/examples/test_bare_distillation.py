"""The example without a trainer gives the trainer's curve and weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from helpers import write_jsonl

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def inputs(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    words = ["weather", "Paris", "teacher", "student", "answer", "five", "fox", "dog", "sunny", "sleeps", "lazy", "quick"]
    rows = [{"prompt": " ".join(words[: 2 + i % 3]) + ":", "completion": " " + " ".join(words[i : i + 5])} for i in range(7)]
    data = write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)
    models = {"student": make_model_dir(layers=2, seed=1), "teacher": make_model_dir(layers=3, width=48, seed=2)}
    return {name: str(path) for name, path in {**models, "data": data}.items()}


def test_curve_is_the_trainers(inputs: dict[str, str], tmp_path: Path) -> None:
    spec = spec_from_file_location("bare_distillation", EXAMPLES / "bare_distillation.py")
    assert spec and spec.loader
    bare = module_from_spec(spec)
    spec.loader.exec_module(bare)
    losses = bare.distil(**inputs, out=tmp_path / "bare", steps=6, batch_size=4, micro_batch_size=2, learning_rate=0.01, seed=3)
    recipe: dict[str, Any] = {
        "student": {"model": inputs["student"]},
        "teacher": {"type": "model", "model": inputs["teacher"]},
        "source": {"type": "dataset", "data": inputs["data"], "max_length": 512},
        "objective": [{"type": "ce", "weight": 0.2}, {"type": "logits"}],
        "train": {
            "steps": 6,
            "batch_size": 4,
            "micro_batch_size": 2,
            "optimizer": {"learning_rate": 0.01, "schedule": "cosine", "warmup_fraction": 0.1},
        },
        "seed": 3,
    }
    run = limbeck.train(recipe, tmp_path / "run")
    assert losses == pytest.approx([row["loss"] for row in run.metrics()], rel=1e-6)
    assert losses[-1] < losses[0]
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "bare", run.student))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-4)  # Adam enlarges the rounding of other chunks


@pytest.mark.slow
def test_example_runs_as_a_program(inputs: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "bare_distillation.py"), *inputs.values(), str(tmp_path / "out"), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "step 2/2" in done.stdout, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_examples_stay_small() -> None:
    limits = {"bare_distillation.py": 120, "with_trl.py": 30}
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(limits)
    for name, limit in limits.items():
        assert (EXAMPLES / name).read_text(encoding="utf-8").count("\n") <= limit, name
