"""A run's directory: files appear whole or not at all, and what a kill leaves can be read."""

from __future__ import annotations

import json
import math
import os

import pytest

from limbeck.errors import RunError
from limbeck.run import Run, environment, write_json

ROWS = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}]


def write_metrics(run, text):
    run.path.mkdir(exist_ok=True)
    run.metrics_file.write_bytes(text if isinstance(text, bytes) else text.encode())


# ---- metrics


def test_metrics(tmp_path):
    run = Run(tmp_path)
    assert run.metrics() == []
    write_metrics(run, "".join(json.dumps(row) + "\n" for row in ROWS))
    assert run.metrics() == ROWS


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "lo', '{"step": 3, "loss": ', "{", "3", '"', b"\xff\xfe", b'{"a": "\xc3', b"\0\0\0\0"], ids=repr
)
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    run = Run(tmp_path)
    torn = torn if isinstance(torn, bytes) else torn.encode()
    write_metrics(run, "".join(json.dumps(row) + "\n" for row in ROWS).encode() + torn)
    assert run.metrics() == ROWS


def test_a_whole_last_line_without_its_newline_counts(tmp_path):
    run = Run(tmp_path)
    write_metrics(run, "\n".join(json.dumps(row) for row in ROWS))
    assert run.metrics() == ROWS


def test_nothing_after_a_broken_line_is_believed(tmp_path):
    run = Run(tmp_path)
    write_metrics(run, json.dumps(ROWS[0]) + "\n{broken\n" + json.dumps(ROWS[1]) + "\n")
    assert run.metrics() == ROWS[:1]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\r"], ids=ascii)
def test_only_a_newline_ends_a_line(tmp_path, separator):
    run, rows = Run(tmp_path), [{"text": f"one{separator}two"}, *ROWS]
    write_metrics(run, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert run.metrics() == rows


# ---- write_json


def test_write_json_makes_folders_and_can_be_read(tmp_path):
    run = Run(tmp_path / "runs" / "one")
    run.write_json("evals/agreement.json", {"metrics": {"kl": 0.5}, "text": "é 天"})
    assert run.read_json("evals/agreement.json") == {"metrics": {"kl": 0.5}, "text": "é 天"}
    assert run.evals() == {"agreement": {"metrics": {"kl": 0.5}, "text": "é 天"}}
    assert "é 天" in (run.path / "evals" / "agreement.json").read_text(encoding="utf-8")


def test_half_a_surrogate_pair_is_escaped(tmp_path):
    write_json(tmp_path / "run.json", {"text": "é \ud83d"})
    assert "é \\ud83d" in (tmp_path / "run.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"text": "é \ud83d"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, object()])
def test_what_json_cannot_say_is_refused_and_the_old_file_stays(tmp_path, value):
    file = tmp_path / "run.json"
    write_json(file, {"status": "running"})
    with pytest.raises((ValueError, TypeError)):
        write_json(file, {"status": "finished", "loss": [1.0, value]})
    assert json.loads(file.read_text()) == {"status": "running"}
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    write_json(file, {"old": 1})
    replace, seen = os.replace, []

    def look_and_replace(source, target):
        seen.append((json.loads(file.read_text()), json.loads(source.read_text())))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_and_replace)
    write_json(file, {"new": 2})
    assert seen == [({"old": 1}, {"new": 2})]
    assert json.loads(file.read_text()) == {"new": 2}


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    write_json(file, {"old": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"run\.json: could not be written \(.*No space left on device"):
        write_json(file, {"new": 2})
    assert json.loads(file.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_directory_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run/run\.json: could not be written"):
        write_json(tmp_path / "file" / "run" / "run.json", {})


# ---- read_json


def test_reading(tmp_path):
    run = Run(tmp_path)
    assert run.read_json("data.json", {}) == {}
    with pytest.raises(RunError, match=r"data\.json: no such file; expected a run directory written by `limbeck train`"):
        run.read_json("data.json")
    for broken in (b"{", b"", b"\xff"):
        (tmp_path / "data.json").write_bytes(broken)
        with pytest.raises(RunError, match=r"data\.json: not readable as JSON"):
            run.read_json("data.json", {})


def test_reading_writes_nothing(tmp_path):
    run = Run(tmp_path / "none")
    assert (run.metrics(), run.evals(), run.is_finished) == ([], {}, False)
    assert not run.path.exists()


@pytest.mark.parametrize(("status", "finished"), [("running", False), ("finished", True)])
def test_is_finished(tmp_path, status, finished):
    run = Run(tmp_path)
    run.write_json("run.json", {"status": status})
    assert run.is_finished is finished


# ---- environment


def test_environment_names_versions_and_nothing_private(monkeypatch):
    monkeypatch.setenv("LIMBECK_TEST_SECRET", "hunter2")
    monkeypatch.setenv("USER", "somebody-private")
    monkeypatch.setattr("sys.argv", ["/home/user/bin/limbeck", "train", "recipe.yaml"])
    found = environment()
    assert {"limbeck", "torch", "transformers"} <= set(found["packages"])
    assert found["command"] == ["limbeck", "train", "recipe.yaml"]
    assert found["num_cpus"] >= 1
    text = json.dumps(found)
    assert not any(private in text for private in ("hunter2", "somebody-private", os.uname().nodename))
