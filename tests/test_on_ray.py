"""On Ray: what comes out is what one process makes, and a worker that dies costs nothing. One local cluster for all tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import limbeck
from helpers import write_jsonl
from limbeck.conduct import run_study
from limbeck.errors import RecipeError, RunError
from limbeck.jobs import Job, Local
from limbeck.on_ray import OnRay
from limbeck.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[OnRay]:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have the tests
    ray.init(
        num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False, runtime_env={"env_vars": {"LIMBECK_LOG": "quiet"}}
    )
    yield OnRay()
    ray.shutdown()


def note(folder: Path, name: str) -> str:
    """Say that a job was here, and what was there before it."""
    before = sorted(file.name for file in folder.iterdir())
    (folder / name).write_text("done")
    return " ".join(before)


def die_once(folder: Path, name: str) -> str:
    if not (folder / f"{name}-died").exists():
        (folder / f"{name}-died").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def refuse(message: str) -> None:
    raise RecipeError(message)


def test_jobs_come_after_what_they_need_and_survive_a_death(cluster: OnRay, tmp_path: Path) -> None:
    jobs = [
        Job("first", partial(die_once, tmp_path, "first")),
        Job("second", partial(note, tmp_path, "second"), ("first",)),
        Job("third", partial(note, tmp_path, "third"), ("second",)),
    ]
    found = dict(cluster.run(jobs))
    assert found == {"first": "first", "second": "first-died", "third": "first-died second"}


def test_a_job_that_fails_says_why_and_leaves_the_others(cluster: OnRay, tmp_path: Path) -> None:
    jobs = [Job("bad", partial(refuse, "steps: found 0")), Job("child", partial(note, tmp_path, "child"), ("bad",))]
    jobs += [Job("good", partial(note, tmp_path, "good"))]
    with pytest.raises(RecipeError, match=r"^steps: found 0$"):
        list(cluster.run(jobs))
    assert [file.name for file in tmp_path.iterdir()] == ["good"]


class Squares:
    """A worker that is made once where it works, and dies at its third item the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, item: int) -> int:
        if item == 3:
            die_once(self.folder, "three")
        return item**2


def test_workers_that_hold_something_survive_a_death(cluster: OnRay, tmp_path: Path) -> None:
    assert sorted(cluster.map(partial(Squares, tmp_path), list(range(8)))) == [item**2 for item in range(8)]
    assert (tmp_path / "three-died").exists()


def test_more_than_there_is_is_refused(cluster: OnRay) -> None:
    with pytest.raises(RunError, match="a worker takes 64 CPU, and the cluster has 2; ask for less"):
        list(OnRay(cpus=64).run([Job("x", partial(refuse, "never"))]))


def conversations(numbers: range) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Add {n} and {n}."}, {"role": "assistant", "content": f"The answer is {2 * n}."}]}
        for n in numbers
    ]


def test_a_capture_is_what_one_process_makes(cluster: OnRay, model_dir: Path, tmp_path: Path) -> None:
    recipe = {
        "teacher": {"type": "model", "model": str(model_dir)},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path / "data.jsonl", conversations(range(12))))},
        "capture": {
            "layers": [1, 3],
            "samples_per_shard": 2,
            "batch_size": 2,
            "codec": {"type": "topk", "k": 8},
            "hidden": {"type": "int8"},
        },
    }
    local = limbeck.capture(recipe, [f"capture.path={tmp_path / 'local'}"])
    by_ray = limbeck.capture(recipe, [f"capture.path={tmp_path / 'ray'}"], executor=cluster)
    assert by_ray == local and len(by_ray.shards) == 6
    for file in (tmp_path / "local").iterdir():
        assert (tmp_path / "ray" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_study_is_what_one_process_makes(cluster: OnRay, model_dir: Path, tmp_path: Path) -> None:
    heldout = str(write_jsonl(tmp_path / "heldout.jsonl", conversations(range(20, 24))))
    base = {
        "student": {"model": str(model_dir), "keep_layers": [0, 3]},
        "teacher": {"type": "model", "model": str(model_dir)},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path / "train.jsonl", conversations(range(10))))},
        "train": {"steps": 2, "batch_size": 4, "micro_batch_size": 4},
        "evaluate": [{"type": "agreement", "data": heldout}],
    }
    arms = {"sft": {"objective": [{"type": "ce"}]}, "then": {"student": {"arm": "sft"}, "objective": [{"type": "logits"}]}}
    tune = {"learning_rates": [1e-3, 1e-2], "of": {"then": [1e-3]}, "evaluate": {"type": "bits_per_byte", "data": heldout}}
    study = Study.model_validate({"name": "tiny", "base": base, "arms": arms, "capture": {}, "tune": tune})
    found = {}
    for where, executor in (("local", Local()), ("ray", cluster)):
        run_study(study, tmp_path / where, executor=executor)
        records = {file.name: json.loads(file.read_text()) for file in (tmp_path / where / "records").iterdir()}
        found[where] = {
            name: (its["key"], its["totals"].get("weights_sha256"), {key: value["items"] for key, value in its["evals"].items()})
            for name, its in records.items()
        }
    assert found["ray"] == found["local"] and len(found["ray"]) == 6


def test_a_driver_that_is_terminated_ends_as_it_would_without_ray() -> None:
    """Ray puts a handler of its own in the place of ours, which aborts."""
    script = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
from limbeck.on_ray import _connected
_connected()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
