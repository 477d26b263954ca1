"""Evaluations during training change nothing of it, and the best of the students that they saw comes out, whatever kills the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from helpers import exit_code, forked, wait_for, write_jsonl
from limbeck import checkpoint, step, trainer
from limbeck.errors import RunError
from limbeck.run import Run
from limbeck.stopping import TRY_AGAIN

WORDS = ["weather", "Paris", "teacher", "student", "answer", "five", "fox", "dog", "sunny", "sleeps", "lazy", "quick"]
BEST = {"best": {"benchmark": "likelihood"}}


def texts(last: str) -> list[dict[str, Any]]:
    return [{"prompt": " ".join(WORDS[: 2 + i % 3]) + ":", "completion": " ".join(WORDS[i : i + 4]) + last} for i in range(8)]


@pytest.fixture(scope="module")
def base(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With dropout, so that random numbers matter, and a rate at which the students get better and worse."""
    folder = tmp_path_factory.mktemp("data")
    held_out = str(write_jsonl(folder / "held-out.jsonl", texts(" again")))
    return {
        "student": {"model": str(make_model_dir(layers=2, seed=1, attention_dropout=0.3))},
        "teacher": {"type": "model", "model": str(make_model_dir(layers=3, width=48, seed=2))},
        "source": {"type": "dataset", "data": str(write_jsonl(folder / "data.jsonl", texts("")))},
        "objective": [{"type": "ce"}, {"type": "logits"}],
        "train": {
            "steps": 13,
            "batch_size": 4,
            "checkpoint_every": 3,
            "keep_checkpoints": 2,
            "evaluate_every": 2,
            "optimizer": {"learning_rate": 0.2},
        },
        "evaluate": [
            {"type": "bits_per_byte", "name": "likelihood", "data": held_out, "batch_size": 1},
            {"type": "agreement", "data": held_out},
        ],
    }


def with_train(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    kept = {key: value for key, value in (base["train"] | changes).items() if value is not None}
    return {**base, "train": kept}


@pytest.fixture(scope="module")
def straight(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return limbeck.train(with_train(base, **BEST), tmp_path_factory.mktemp("runs") / "straight")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.student / "model.safetensors")


def told(run: Run) -> dict[str, Any]:
    """What came out, without times."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in run.evaluations()]
    results = [{key: value for key, value in its.items() if key != "seconds"} for its in run.evals().values()]
    totals = run.read_json("run.json")
    losses = [(row["step"], row["loss"]) for row in run.metrics()]
    return {"rows": rows, "results": results, "losses": losses, "best": totals.get("best"), "weights": totals["weights_sha256"]}


def test_they_change_nothing_of_what_is_learned(base: dict[str, Any], straight: Run, tmp_path: Path) -> None:
    without = limbeck.train(with_train(base, evaluate_every=None), tmp_path / "without")
    beside = limbeck.train(with_train(base, evaluate_every=5, evaluate_only=["likelihood"]), tmp_path / "beside")
    assert told(without)["losses"] == told(beside)["losses"] == told(straight)["losses"]
    assert without.read_json("run.json")["weights_sha256"] == beside.read_json("run.json")["weights_sha256"]
    assert not without.evaluations_file.exists() and "best" not in beside.read_json("run.json")
    assert [(row["step"], list(row["metrics"])) for row in beside.evaluations()] == [(n, ["likelihood"]) for n in (0, 5, 10, 13)]


def test_a_row_says_what_its_results_say(straight: Run) -> None:
    assert [row["step"] for row in straight.evaluations()] == [0, 2, 4, 6, 8, 10, 12, 13]
    for row in straight.evaluations():
        for name, metrics in row["metrics"].items():
            assert json.loads((straight.evals_after(row["step"]) / f"{name}.json").read_text())["metrics"] == metrics


def test_the_best_is_the_student(base: dict[str, Any], straight: Run, tmp_path: Path) -> None:
    values = {row["step"]: row["metrics"]["likelihood"]["bits_per_byte"]["value"] for row in straight.evaluations()}
    best = straight.read_json("run.json")["best"]
    lowest = min(values, key=lambda step: values[step])
    assert best == {"step": lowest, "benchmark": "likelihood", "metric": "bits_per_byte", "value": values[lowest]}
    assert lowest not in (0, 13), "this recipe is to have its best in between"
    every = limbeck.train(with_train(base, evaluate_every=None, checkpoint_every=2, keep_checkpoints=9), tmp_path / "every")
    at_best = load_file(every.checkpoints / f"step-{lowest:08d}" / "learner.safetensors")
    ours = weights(straight)
    assert all(torch.equal(value, at_best[f"student.{name}"]) for name, value in ours.items())
    assert not straight.best.exists() and straight.read_json("run.json")["steps"] == 13


def test_the_student_is_not_graded_twice(straight: Run) -> None:
    """With the times of the evaluation that saw it."""
    folder = straight.evals_after(straight.read_json("run.json")["best"]["step"])
    assert straight.evals() == {name: json.loads((folder / f"{name}.json").read_text()) for name in ("likelihood", "agreement")}


def test_where_more_is_better(base: dict[str, Any], tmp_path: Path) -> None:
    chosen = {"benchmark": "agreement", "metric": "top1"}
    run = limbeck.train(with_train(base, steps=6, best=chosen, evaluate_only=["agreement"]), tmp_path / "run")
    values = {row["step"]: row["metrics"]["agreement"]["top1"]["value"] for row in run.evaluations()}
    assert len(set(values.values())) > 1
    first = next(step for step, value in values.items() if value == max(values.values()))
    assert run.read_json("run.json")["best"] == {"step": first, **chosen, "value": values[first]}


def test_adapters(base: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    slower = with_train(base, **BEST, optimizer={"learning_rate": 0.02}, evaluate_only=["likelihood"])
    tree = {**slower, "student": {**base["student"], "lora": {"rank": 4, "alpha": 64}}}
    run = limbeck.train(tree, tmp_path / "run")
    best = run.read_json("run.json")["best"]
    assert best["step"] not in (0, 13)
    found = run.evals()["likelihood"]["metrics"]["bits_per_byte"]["value"]
    assert found == pytest.approx(best["value"], rel=1e-5) and run.adapters.is_dir()


def kill(recipe: Path, out: Path, log: Path, moment: Callable[[], object], number: int = signal.SIGKILL) -> int:
    """Start the command line, and how it ended when it was told to at this moment."""
    process = forked(["train", str(recipe), "--out", str(out)], log)
    wait_for(moment)
    os.kill(process, number)
    return exit_code(process)


def test_kills_leave_no_gap_and_lose_no_best(base: dict[str, Any], straight: Run, tmp_path: Path) -> None:
    """Killed where the fourth evaluation is at work, and behind the sixth, where the best is newer than the checkpoint."""
    recipe, out, log = tmp_path / "recipe.yaml", tmp_path / "killed", tmp_path / "log.txt"
    recipe.write_text(json.dumps(with_train(base, **BEST)))
    run = Run(out)
    assert kill(recipe, out, log, lambda: list(out.glob("evals/step-00000006/*"))) == -signal.SIGKILL
    assert kill(recipe, out, log, lambda: len(run.evaluations()) > 5) == -signal.SIGKILL
    assert not run.is_trained
    assert exit_code(forked(["train", str(recipe), "--out", str(out)], log)) == 0
    assert told(run) == told(straight)


def test_an_evaluation_that_is_told_to_stop_goes_on(base: dict[str, Any], straight: Run, tmp_path: Path) -> None:
    recipe, out, log = tmp_path / "recipe.yaml", tmp_path / "stopped", tmp_path / "log.txt"
    recipe.write_text(json.dumps(with_train(base, **BEST)))
    run = Run(out)
    partial = run.evals_after(8) / "likelihood.partial.jsonl"
    assert kill(recipe, out, log, partial.exists, signal.SIGTERM) == TRY_AGAIN
    assert [row["step"] for row in run.evaluations()] == [0, 2, 4, 6]
    assert checkpoint.steps(run.checkpoints)[0] == 8
    assert exit_code(forked(["train", str(recipe), "--out", str(out)], log)) == 0
    assert told(run) == told(straight)


@pytest.fixture
def broken_off(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that ended behind its eleventh step, with checkpoints of 6 and 9 steps."""
    steps: list[int] = []

    def stop(*args: Any) -> Any:
        steps.append(1)
        if len(steps) > 11:
            raise RunError("enough")
        return step.optimizer_step(*args)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="enough"):
        patch.setattr(trainer, "optimizer_step", stop)
        limbeck.train(with_train(base, **BEST), tmp_path / "run")
    return Run(tmp_path / "run")


def test_from_a_checkpoint_before_the_best(base: dict[str, Any], straight: Run, broken_off: Run) -> None:
    """What was the best at each checkpoint is there, so the newest may be done without."""
    values = {row["step"]: row["metrics"]["likelihood"]["bits_per_byte"]["value"] for row in straight.evaluations()}
    bests = {min((step for step in values if step <= end), key=lambda step: values[step]) for end in (6, 9, 11)}
    assert len(bests) == 3 and set(checkpoint.steps(broken_off.best)) == bests
    shutil.rmtree(broken_off.checkpoints / "step-00000009")
    assert told(limbeck.train(with_train(base, **BEST), broken_off.path)) == told(straight)


def test_a_best_that_is_damaged_is_named_and_can_be_done_without(base: dict[str, Any], broken_off: Run) -> None:
    for folder in broken_off.best.iterdir():  # which of them is needed, rounding decides
        content = bytearray((folder / "learner.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "learner.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"best/step-\d+: damaged: .* Delete this folder to go on without it"):
        limbeck.train(with_train(base, **BEST), broken_off.path)
    shutil.rmtree(broken_off.best)
    run = limbeck.train(with_train(base, **BEST), broken_off.path)
    assert run.read_json("run.json")["best"]["step"] >= 10 and run.is_finished


def test_a_metric_that_only_a_run_can_tell(base: dict[str, Any], tmp_path: Path) -> None:
    """Before anything is trained."""
    added = {"type": "exact_match", "task": "chain_sum", "limit": 2, "max_new_tokens": 4}
    tree = with_train(base, best={"benchmark": "exact_match", "metric": "accuracy/hard"}, evaluate_only=["exact_match"])
    with pytest.raises(RunError, match=r"train\.best\.metric: found 'accuracy/hard', expected a metric of 'exact_match': accuracy"):
        limbeck.train({**tree, "evaluate": [added]}, tmp_path / "run")
    assert not Run(tmp_path / "run").metrics()
