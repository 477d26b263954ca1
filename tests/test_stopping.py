"""SIGTERM and Ctrl-C end a command in good order; a second one ends it at once; what a script ignores stays ignored."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from helpers import exit_code, forked, wait_for, write_jsonl
from limbeck import stopping


def child(work: Callable[[], object], interrupt: Any = signal.default_int_handler) -> int:
    """A fork that does this, and exits with 7 where it was stopped in good order."""
    process = os.fork()
    if not process:
        code = 1
        try:
            signal.signal(signal.SIGINT, interrupt)
            with stopping.listening():
                work()
        except stopping.Stopped:
            code = 7
        finally:
            os._exit(code)
    return process


def tell(process: int, number: int = signal.SIGTERM, after: float = 0.0) -> None:
    time.sleep(after)
    os.kill(process, number)


def sleeping(flag: Path) -> None:
    flag.touch()
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_where_nothing_is_deferred_the_first_signal_stops_at_once(number: int, tmp_path: Path) -> None:
    process = child(lambda: sleeping(tmp_path / "flag"))
    wait_for((tmp_path / "flag").exists)
    tell(process, number)
    assert exit_code(process, 20) == 7


def test_deferred_work_ends_where_it_likes(tmp_path: Path) -> None:
    def work() -> None:
        with stopping.deferred():
            (tmp_path / "flag").touch()
            while not stopping.asked():
                time.sleep(0.01)
            (tmp_path / "written").touch()
        raise AssertionError("the end of deferred work is where it stops")

    process = child(work)
    wait_for((tmp_path / "flag").exists)
    tell(process)
    assert exit_code(process, 20) == 7 and (tmp_path / "written").exists()


def test_a_second_signal_ends_the_process_even_inside_of_a_long_call(tmp_path: Path) -> None:
    def work() -> None:
        with stopping.deferred():
            (tmp_path / "flag").touch()
            while True:
                time.sleep(0.01)

    process = child(work)
    wait_for((tmp_path / "flag").exists)
    tell(process)
    tell(process, after=0.05)  # a launcher that passes on what the terminal has sent already
    tell(process, after=stopping.ECHO / 2)
    assert os.waitpid(process, os.WNOHANG) == (0, 0)
    tell(process, after=stopping.ECHO)
    assert exit_code(process, 20) == 128 + signal.SIGTERM


def test_what_was_ignored_stays_ignored(tmp_path: Path) -> None:
    """A script's background jobs ignore Ctrl-C."""
    process = child(lambda: sleeping(tmp_path / "flag"), signal.SIG_IGN)
    wait_for((tmp_path / "flag").exists)
    tell(process, signal.SIGINT)
    tell(process, signal.SIGTERM, after=0.2)
    assert exit_code(process, 20) == 7


def test_a_library_answers_no_signals() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background ignores it
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with stopping.listening():
        assert [signal.getsignal(number) for number in stopping.SIGNALS] != before
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before and not stopping.asked()


@pytest.fixture(scope="module")
def recipe(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = [{"prompt": f"Add {n} and {n}.", "completion": f" The answer is {2 * n}."} for n in range(8)]
    data = str(write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows))
    return {
        "student": {"model": str(make_model_dir(layers=1, seed=1))},
        "source": {"type": "dataset", "data": data},
        "objective": [{"type": "ce"}],
        "train": {"steps": 40, "batch_size": 4},
        "evaluate": [{"type": "bits_per_byte", "data": data, "batch_size": 1}],
    }


def test_a_run_without_checkpoints_leaves_one_when_it_is_stopped(recipe: dict[str, Any], tmp_path: Path) -> None:
    file, run = tmp_path / "recipe.yaml", limbeck.Run(tmp_path / "run")
    file.write_text(str(recipe))
    arguments = ["train", str(file), "--out", str(run.path)]
    process = forked(arguments, tmp_path / "log.txt")
    wait_for(lambda: len(run.metrics()) >= 3)
    tell(process)
    assert exit_code(process) == stopping.TRY_AGAIN
    log = (tmp_path / "log.txt").read_text()
    assert "SIGTERM: stopping as soon as what is begun is written; once more stops at once" in log
    assert log.endswith("stopped; start the same command again to go on from what was written\n")
    (checkpoint,) = run.checkpoints.glob("step-*[0-9]")
    assert int(checkpoint.name.removeprefix("step-")) == run.metrics()[-1]["step"] < 40
    resumed, straight = limbeck.train(str(file), run.path), limbeck.train(recipe, tmp_path / "straight")
    assert [row["loss"] for row in resumed.metrics()] == [row["loss"] for row in straight.metrics()]
    assert not run.checkpoints.exists(), "none were asked for"
    ours, theirs = (load_file(each.student / "model.safetensors") for each in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_is_stopped_while_it_is_evaluated_is_not_trained_again(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import limbeck.trainer

    def stop(*arguments: Any) -> None:
        raise stopping.Stopped

    short = {**recipe, "train": {"steps": 2}}
    with monkeypatch.context() as patch, pytest.raises(stopping.Stopped):
        patch.setattr(limbeck.trainer, "evaluate", stop)
        limbeck.train(short, tmp_path / "run")
    run = limbeck.Run(tmp_path / "run")
    assert run.is_trained and not run.is_finished
    monkeypatch.setattr(limbeck.trainer, "optimizer_step", stop)
    limbeck.train(short, run.path)
    assert run.is_finished and "trained already" in capfd.readouterr().err
    monkeypatch.undo()
    straight = limbeck.train(short, tmp_path / "straight")
    items = [{name: result["items"] for name, result in each.evals().items()} for each in (run, straight)]
    assert items[0] == items[1]


def test_a_student_that_was_altered_since_is_not_evaluated(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = limbeck.train({**recipe, "train": {"steps": 1}}, tmp_path / "run")
    run.write_json("run.json", run.read_json("run.json") | {"status": "trained", "weights_sha256": "0"})
    with pytest.raises(limbeck.LimbeckError, match=r"run/student: the weights were altered since they were trained"):
        limbeck.train({**recipe, "train": {"steps": 1}}, run.path)
