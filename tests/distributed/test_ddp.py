"""Two gloo processes give what one gives: weights, projections and log, with uneven tokens per rank and an empty microbatch."""

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
from helpers import write_jsonl


@pytest.mark.parametrize(("name", "tied", "pack_length"), [("everything", True, 80), ("hidden only", False, None)])
def test_two_ranks_equal_one(
    name: str,
    tied: bool,
    pack_length: int | None,
    make_model_dir: Callable[..., Path],
    fake_wandb: Callable[[], list[Any]],
    tmp_path: Path,
) -> None:
    """5 conversations of very unequal length in microbatches of 2: rank 1 gets one microbatch less, so an empty one. Packed into 3 rows,
    one per microbatch, they are also the same as a row each on one rank."""
    rows = [{"prompt": "The weather", "completion": " in Paris is sunny." * (1 + 3 * i)} for i in range(5)]
    terms: list[dict[str, Any]] = [{"type": "hidden"}]
    if name == "everything":
        terms += [{"type": "ce", "weight": 0.5}, {"type": "logits", "temperature": 2.0}, {"type": "logits", "divergence": "reverse_kl"}]
    recipe = {
        "student": {"model": str(make_model_dir(layers=2, seed=1, tied=tied))},
        "teacher": {"type": "model", "model": str(make_model_dir(layers=3, width=48, seed=2))},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path / "data.jsonl", rows))},
        "objective": terms,
        "train": {
            "steps": 4,
            "batch_size": 5,
            "micro_batch_size": 2,
            "checkpoint_every": 4,
            "report_to": ["wandb"],
            "optimizer": {"learning_rate": 0.003, "epsilon": 1e-4},
        },
    }
    alone = limbeck.train(recipe, tmp_path / "alone")
    recipe["train"] |= {"pack_length": pack_length, "micro_batch_size": 1 if pack_length else 2}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "limbeck", "train", str(file), "--out", str(tmp_path / "two"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    two = limbeck.Run(tmp_path / "two")
    assert [row for what, row in fake_wandb() if what == "row"] == [*alone.metrics(), *two.metrics()], "only rank 0 reports"
    for ours, theirs in zip(two.metrics(), alone.metrics(), strict=True):
        assert ours["tokens"] == theirs["tokens"] and ours["scored_tokens"] == theirs["scored_tokens"]
        for key in ("loss", "grad_norm", *(key for key in theirs if key.startswith("loss/"))):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    ours, theirs = (load_file(run.checkpoints / "step-00000004" / "learner.safetensors") for run in (two, alone))
    assert any(key.startswith("projections.") for key in ours)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-6, msg=key)
