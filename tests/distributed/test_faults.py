"""Two gloo processes of which one is stopped, skips a step, dies or hangs: the other does the same, or says so in bounded time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from helpers import exit_code, forked_ranks, make_tokenizer, save_model, tiny_model, wait_for, write_jsonl
from limbeck.errors import RunError
from limbeck.stopping import TRY_AGAIN


@pytest.fixture(scope="module")
def recipe(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = [{"prompt": f"Add {n} and {n}.", "completion": f" The answer is {2 * n}."} for n in range(6)]
    return {
        "student": {"model": str(make_model_dir(layers=1, seed=1))},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows))},
        "objective": [{"type": "ce"}],
        "train": {"steps": 300, "batch_size": 4, "optimizer": {"epsilon": 1e-4}},
    }


def start(recipe: dict[str, Any], folder: Path, *overrides: str, **environment: str) -> tuple[list[int], limbeck.Run]:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    return forked_ranks(["train", str(file), *overrides, "--out", str(folder / "run")], folder, **environment), limbeck.Run(folder / "run")


def begun(run: limbeck.Run) -> None:
    wait_for(lambda: len(run.metrics()) >= 2)


def test_a_signal_to_one_rank_stops_both_after_the_same_step(recipe: dict[str, Any], tmp_path: Path) -> None:
    ranks, run = start(recipe, tmp_path)
    begun(run)
    os.kill(ranks[1], signal.SIGTERM)
    assert [exit_code(rank) for rank in ranks] == [TRY_AGAIN, TRY_AGAIN], (tmp_path / "rank-0.txt").read_text()
    (checkpoint,) = run.checkpoints.glob("step-*[0-9]")
    assert int(checkpoint.name.removeprefix("step-")) == run.metrics()[-1]["step"] < 300


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 30), (signal.SIGSTOP, 90)], ids=["dies", "hangs"])
def test_a_rank_that_is_lost_stops_the_other_in_bounded_time(recipe: dict[str, Any], tmp_path: Path, number: int, seconds: int) -> None:
    """One that is gone is noticed at once, one that is silent when its time is over."""
    ranks, run = start(recipe, tmp_path, LIMBECK_TIMEOUT="12")
    begun(run)
    start_ = time.monotonic()
    os.kill(ranks[1], number)
    assert exit_code(ranks[0], seconds) == 2
    assert time.monotonic() - start_ < seconds
    assert "another process of this run has died, or did not answer for 12 seconds (LIMBECK_TIMEOUT sets that)" in (
        tmp_path / "rank-0.txt"
    ).read_text().replace("\n", " ")
    os.kill(ranks[1], signal.SIGKILL)
    os.waitpid(ranks[1], 0)


def test_a_step_is_skipped_on_all_ranks_alike(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The one conversation at which the teacher knows no number is on one rank only."""
    teacher, tokenizer = tiny_model(layers=2, width=48, seed=2, tied=False), make_tokenizer()
    with torch.no_grad():
        teacher.model.embed_tokens.weight[tokenizer("~", add_special_tokens=False)["input_ids"][0]] = torch.nan
    rows = [{"prompt": f"Add {n}.", "completion": f" It is {2 * n}{'~' if n == 3 else ''}."} for n in range(6)]
    recipe = {
        **recipe,
        "teacher": {"type": "model", "model": str(save_model(tmp_path / "teacher", teacher, tokenizer))},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path / "data.jsonl", rows))},
        "objective": [{"type": "ce"}, {"type": "logits"}],
        "train": {"steps": 6, "batch_size": 2, "max_skipped_steps": 1, "optimizer": {"epsilon": 1e-4}},
    }
    ranks, two = start(recipe, tmp_path)
    assert [exit_code(rank) for rank in ranks] == [0, 0], (tmp_path / "rank-0.txt").read_text()
    one = limbeck.train(recipe, tmp_path / "one")
    skipped = [[row["step"] for row in run.metrics() if row.get("skipped")] for run in (one, two)]
    assert len(skipped[0]) == 2 and skipped[0] == skipped[1]
    ours, theirs = (load_file(run.student / "model.safetensors") for run in (two, one))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_a_timeout_is_seconds(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LIMBECK_TIMEOUT": "soon"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="LIMBECK_TIMEOUT: found 'soon', expected seconds"):
        limbeck.train(recipe, tmp_path / "run")


VOTE = """
import time
from limbeck import distributed

with distributed.world() as world:
    distributed.barrier(world)
    if world.rank:
        time.sleep(120)
    distributed.any_rank(False, world)
"""


def test_one_that_does_not_vote_is_noticed_in_time(tmp_path: Path) -> None:
    """Also where the others ask whether to stop, as they do before every microbatch."""
    with closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "LIMBECK_TIMEOUT": "5"}
    ranks = [subprocess.Popen([sys.executable, "-c", VOTE], env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE) for rank in (0, 1)]
    try:
        _, told = ranks[0].communicate(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
        ranks[1].communicate()
    assert ranks[0].returncode == 1 and b"did not answer for 5 seconds" in told
