"""LoRA goes the way of full training: the same equivalences, a resume to the bit, and adapters that PEFT reads as we merge them."""

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
from transformers import AutoModelForCausalLM

import limbeck
from helpers import killed_run, write_jsonl
from limbeck.models import load_model, weights_hash

pytest.importorskip("peft")

PLAIN = {"rank": 4, "alpha": 8}
LORA = {"lora": PLAIN, "dora": {**PLAIN, "dora": True}, "two targets": {**PLAIN, "targets": ["q_proj", "mlp.down_proj"]}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": "The weather", "completion": " in Paris is sunny." * (1 + 3 * i)} for i in range(5)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, data: Path, make_model_dir: Callable[..., Path]) -> dict[str, Any]:
    """All terms at once, the hidden one through trained projections."""
    return {
        "student": {"model": str(make_model_dir(layers=2, seed=1, tied=request.param)), "lora": PLAIN},
        "teacher": {"type": "model", "model": str(make_model_dir(layers=3, width=48, seed=2))},
        "source": {"type": "dataset", "data": str(data)},
        "objective": [{"type": "ce", "weight": 0.5}, {"type": "logits", "temperature": 2.0}, {"type": "hidden"}],
        "train": {
            "steps": 4,
            "batch_size": 5,
            "micro_batch_size": 5,
            "checkpoint_every": 4,
            "optimizer": {"learning_rate": 0.01, "epsilon": 1e-4},
        },
    }


def _trained(run: limbeck.Run) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoints / "step-00000004" / "learner.safetensors")


def _assert_same(a: limbeck.Run, b: limbeck.Run) -> None:
    assert [row["loss"] for row in a.metrics()] == pytest.approx([row["loss"] for row in b.metrics()], rel=1e-4)
    ours, theirs = _trained(a), _trained(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("lora", LORA.values(), ids=LORA)
def test_how_a_step_is_cut_up_does_not_matter(base: dict[str, Any], lora: dict[str, Any], tmp_path: Path) -> None:
    base = {**base, "student": {**base["student"], "lora": lora}}
    whole = limbeck.train(base, tmp_path / "whole")
    losses = [row["loss"] for row in whole.metrics()]
    assert losses[-1] < losses[0]
    others = {
        "accumulated": ["train.micro_batch_size=2"],
        "packed": ["train.pack_length=80", "train.micro_batch_size=1"],
        "plain": ["train.head=plain"],
        "chunks": ["train.head_memory_mb=1"],
        "recomputed": ["train.gradient_checkpointing=true"],
    }
    for name, overrides in others.items():
        _assert_same(whole, limbeck.train(base, tmp_path / name, overrides))


def test_two_ranks_equal_one(base: dict[str, Any], tmp_path: Path) -> None:
    """Also where the teacher is the student's own base, whose adapters are switched off and on between the microbatches."""
    base = {**base, "teacher": {"type": "model", "model": base["student"]["model"]}}
    alone = limbeck.train(base, tmp_path / "alone")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(base))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "limbeck", "train", str(file), "train.micro_batch_size=2", "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "two")], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    _assert_same(limbeck.Run(tmp_path / "two"), alone)


def test_checkpoints_hold_what_is_trained_and_nothing_else(base: dict[str, Any], tmp_path: Path) -> None:
    run = limbeck.train(base, tmp_path / "run")
    names = set(_trained(run))
    assert {name.split(".")[0] for name in names} == {"student", "projections"}
    assert all("lora_" in name for name in names if name.startswith("student."))
    sizes = {name.split(":")[0] for name in load_file(run.checkpoints / "step-00000004" / "optimizer.safetensors")}
    assert sizes == {"exp_avg", "exp_avg_sq", "step"}
    frozen, merged = load_model(base["student"]["model"]), load_model(str(run.student))
    for name, value in frozen.named_parameters():
        changed = not torch.equal(value, dict(merged.named_parameters())[name])
        assert changed == ("proj" in name), name
    assert run.read_json("data.json")["initial_weights_sha256"] == weights_hash(dict(frozen.named_parameters()))
    assert run.read_json("run.json")["weights_sha256"] == weights_hash(dict(merged.named_parameters()))


@pytest.mark.parametrize("lora", LORA.values(), ids=LORA)
def test_peft_reads_the_adapters_and_gets_the_merged_students_logits(base: dict[str, Any], lora: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    run = limbeck.train({**base, "student": {**base["student"], "lora": lora}}, tmp_path / "run")
    config = json.loads((run.adapters / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base["student"]["model"] and config["inference_mode"]
    ids = torch.arange(3, 40)[None]
    before = AutoModelForCausalLM.from_pretrained(base["student"]["model"], dtype=torch.float32).eval()
    untrained = before(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(before, run.adapters).eval()(input_ids=ids).logits
    merged = load_model(str(run.student))(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (merged - untrained).abs().max() > 0.1


def test_resume_after_a_kill_gives_the_bits_of_a_straight_run(base: dict[str, Any], tmp_path: Path) -> None:
    base = {**base, "student": {**base["student"], "lora": {**PLAIN, "dropout": 0.2}}}
    settings = ["train.steps=40", "train.checkpoint_every=3"]
    straight = limbeck.train(base, tmp_path / "straight", settings)
    path = killed_run(base, tmp_path, settings)
    resumed = limbeck.train(base, path, settings)
    assert [row["loss"] for row in resumed.metrics()] == [row["loss"] for row in straight.metrics()]
    for file in ("adapters/adapter_model.safetensors", "student/model.safetensors"):
        ours, theirs = load_file(path / file), load_file(straight.path / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
