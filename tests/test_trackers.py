"""Trackers get exactly the rows of metrics.jsonl, from rank 0, also over a resume; real packages run where they are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import limbeck
from helpers import write_jsonl
from limbeck import trackers
from limbeck.checkpoint import remove
from limbeck.errors import RecipeError, RunError
from limbeck.run import Run


@pytest.fixture
def recipe(make_model_dir: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": "The weather", "completion": " in Paris is sunny." * (1 + i)} for i in range(4)]
    return {
        "student": {"model": str(make_model_dir(layers=2))},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path / "data.jsonl", rows))},
        "objective": [{"type": "ce"}],
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "keep_checkpoints": 4},
    }


def _cut_back(run: Run, step: int) -> None:
    """Make a finished run one that was killed after its last step, with no checkpoint behind `step`."""
    run.write_json("run.json", {"status": "running"})
    for path in run.checkpoints.iterdir():
        if int(path.name.removeprefix("step-")) > step:
            remove(path)


def _tracked(base: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**base, "train": {**base["train"], "report_to": list(names)}}


def test_tracker_gets_the_rows_of_the_log_also_after_a_resume(
    recipe: dict[str, Any], fake_wandb: Callable[[], list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = limbeck.train(_tracked(recipe, "wandb"), tmp_path / "runs" / "mine")
    told = fake_wandb()
    assert [row for what, row in told if what == "row"] == run.metrics()
    (settings,) = [value for what, value in told if what == "init"]
    assert settings["config"] == run.read_json("recipe.json") and settings["name"] == "mine" and settings["resume"] == "allow"
    assert told[1] == ["axis", "step"] and told[-1] == ["finish", 0]
    _cut_back(run, 2)
    limbeck.train(_tracked(recipe, "wandb"), run.path)
    resumed = fake_wandb()[len(told) :]
    assert [row["step"] for what, row in resumed if what == "row"] == [3, 4]
    assert resumed[0][1]["id"] == settings["id"], "a resumed run goes on where it was"
    assert capsys.readouterr().out == "", "standard output is kept for results"


def test_tracker_that_fails_is_given_up_and_the_run_goes_on(
    recipe: dict[str, Any],
    fake_wandb: Callable[[], list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_WANDB_BREAKS", "2")
    run = limbeck.train(_tracked(recipe, "wandb"), tmp_path / "run")
    assert run.is_finished and [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    assert [row["step"] for what, row in fake_wandb() if what == "row"] == [1]
    assert "wandb: ConnectionError: no network; nothing more is sent to it" in " ".join(capsys.readouterr().err.split())


def test_run_that_stops_is_marked_as_failed(recipe: dict[str, Any], fake_wandb: Callable[[], list[Any]], tmp_path: Path) -> None:
    broken = _tracked(recipe, "wandb")
    broken["train"]["optimizer"] = {"learning_rate": 1e30, "max_grad_norm": None, "warmup_fraction": 0}
    with pytest.raises(RunError, match="not finite"):
        limbeck.train(broken, tmp_path / "run")
    assert fake_wandb()[-1] == ["finish", 1]


def test_tracker_that_cannot_start_is_an_error(
    recipe: dict[str, Any], fake_wandb: Callable[[], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WANDB_REFUSES", "1")
    with pytest.raises(RunError, match="'wandb' could not be started: ValueError: no api key"):
        limbeck.train(_tracked(recipe, "wandb"), tmp_path / "run")


def test_missing_package_is_named_before_a_model_is_loaded(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    recipe["student"]["model"] = "nobody/nothing"
    with pytest.raises(RecipeError, match=r"train\.report_to: 'trackio' is not installed; expected its package: pip install trackio wandb"):
        limbeck.train(_tracked(recipe, "trackio", "wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/logits", "logits"), ("/x/runs/demo/arms/sft/seed-0", "demo-sft-seed-0"), ("/a/arms", "arms")],
)
def test_names_are_for_people(path: str, name: str) -> None:
    assert trackers._name(Path(path)) == name


def test_identity_stays_with_the_directory(tmp_path: Path) -> None:
    first = trackers.identity(Run(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert trackers.identity(Run(tmp_path / "b")) == first != trackers.identity(Run(tmp_path / "c"))


def test_tensorboard_has_every_step_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = limbeck.train(_tracked(recipe, "tensorboard"), tmp_path / "run")
    _cut_back(run, 2)
    run = limbeck.train(_tracked(recipe, "tensorboard"), run.path)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    rows = run.metrics()
    assert set(events.Tags()["scalars"]) == set(rows[0]) - {"step"}
    for key in ("loss", "loss/ce", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows]


@pytest.mark.slow
def test_trackio_has_every_step(recipe: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(_tracked(recipe, "trackio")))
    # trackio chooses its folder when it is imported
    settings = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "limbeck", "train", str(file), "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert done.returncode == 0 and json.loads(done.stdout), done.stderr
    run = Run(tmp_path / "run")
    name = "-".join(trackers.identity(run))
    code = f"""
import json
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps(SQLiteStorage.get_logs({trackers.PROJECT!r}, {name!r})))
"""
    logs = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, check=True).stdout)
    keys = run.metrics()[0]
    assert [{key: row[key] for key in keys} for row in logs] == run.metrics()
