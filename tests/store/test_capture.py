"""Capturing again, after a kill, on several workers, on a full disk: the same store comes out, and nothing else is touched."""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from captures import ALL, ROWS, SHORT, conversation, names, run, samples_of

import limbeck
from helpers import write_jsonl
from limbeck.errors import RecipeError, StoreError
from limbeck.store import shard as shard_module
from limbeck.store import writer as writer_module
from limbeck.store.manifest import read_manifest
from limbeck.store.shard import Row, write_shard
from limbeck.store.verify import verify
from limbeck.teachers import StoreTeacher

capture_module = importlib.import_module("limbeck.capture")  # `limbeck.capture` is the function

# ---- capturing again


def test_the_same_capture_again_does_nothing(base, store, monkeypatch):
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in store.iterdir()}
    monkeypatch.setattr(capture_module, "score", lambda *args: pytest.fail("scored again"))
    run(base, store)
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in store.iterdir()} == before


def test_the_same_teacher_under_another_path_is_the_same(base, store, teacher_dir, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(teacher_dir)
    monkeypatch.setattr(capture_module, "score", lambda *args: pytest.fail("scored again"))
    run(base, store, f"teacher.model={tmp_path / 'link'}")


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("capture.layers=[1]", r"layers is \(1, 3\), this recipe needs \(1,\)"),
        ("teacher.dtype=bfloat16", "teacher.dtype is 'float32'"),
        ("teacher.load_in=4bit", "teacher.load_in is None, this recipe needs '4bit'"),
        ("capture.hidden={type: int8}", "hidden is {'type': 'float32'}, this recipe needs {'type': 'int8'}"),
    ],
)
def test_another_capture_in_the_same_place_is_refused_by_field(base, store, override, field, monkeypatch):
    """Before anything loads."""
    before = (store / "manifest.json").read_bytes()
    monkeypatch.setattr(capture_module, "load_tokenizer", lambda *args: pytest.fail("loaded something"))
    with pytest.raises(StoreError, match=f"holds another capture: {field}.*Set capture.path to a new folder"):
        run(base, store, override)
    assert (store / "manifest.json").read_bytes() == before


def test_other_weights_in_the_same_place_are_refused(base, store, make_model_dir):
    other = make_model_dir(layers=4, width=48, seed=6)
    with pytest.raises(StoreError, match=r"holds another capture: teacher\.weights_sha256 is"):
        run(base, store, f"teacher.model={other}")


@pytest.mark.parametrize("what", ["a file", "a folder with 'notes.txt' and no manifest.json", "a folder with 'notes.txt'"])
def test_something_else_in_the_place_is_refused_and_left_alone(base, tmp_path, what):
    path = tmp_path / "taken"
    if what == "a file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=f"taken': found {what}.*expected a new folder or one written by `limbeck capture`"):
        run(base, path)
    assert path.read_text() == "mine" if path.is_file() else names(path) == ["notes.txt"]


def test_an_empty_folder_is_a_new_one(base, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run(base, tmp_path / "empty", "source.limit=2").num_samples == 2


def test_a_place_that_cannot_be_made(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"head\.safetensors: could not be written"):
        run(base, tmp_path / "file" / "store")


def test_a_url_is_no_place_to_write(base):
    with pytest.raises(StoreError, match="found a URL, expected a folder: captures are written to disk, and may be copied from there"):
        run(base, "memory://store")


@pytest.mark.parametrize("change", [{"capture": None}, {"teacher": {"type": "none"}}])
def test_what_cannot_be_captured_is_said_before_anything_loads(base, change, monkeypatch):
    monkeypatch.setattr(capture_module, "load_tokenizer", lambda *args: pytest.fail("loaded something"))
    tree = {**base, "capture": {"path": "store"}, **change}
    with pytest.raises(
        RecipeError, match=r"^(capture: missing|teacher\.type: found 'none', expected one of 'distillkit', 'model', 'server')"
    ):
        limbeck.capture(tree)


# ---- kills


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


class Killed(BaseException):
    pass


def die_at(monkeypatch, module, name, number, after=False):
    """Raise at the given call of a function, before or after it did its work."""
    real, count = getattr(module, name), 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number and not after:
            raise Killed
        result = real(*args, **kwargs)
        if count == number:
            raise Killed
        return result

    monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize(
    ("module", "name", "number", "kept"),
    [
        (writer_module, "save_file", 1, 0),  # the head is written and has no name
        (capture_module, "score", 3, 0),
        (shard_module, "describe_file", 1, 0),  # a shard is written and has no name
        (shard_module, "describe_file", 3, 2),
        (writer_module, "write_json", 1, 0),  # a shard has its name, and nobody knows it
        (writer_module, "write_json", 3, 2),
        (writer_module, "write_json", 5, 4),  # all entries are there, and the manifest does not have them
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_a_killed_capture_goes_on_where_it_was(base, captured, tmp_path, monkeypatch, module, name, number, kept, after):
    path = tmp_path / "store"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, module, name, number, after)
        run(base, path)
    there = read_manifest(path).shards if (path / "manifest.json").is_file() else ()
    assert len(there) >= kept
    scored, real = [], capture_module.score
    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "score", lambda *args: (scored.extend(args[1]), real(*args))[1])
        run(base, path)
    assert len(scored) == 7 - sum(shard.num_samples for shard in there), "only what was not written is scored again"
    assert files(path) == files(captured)


def test_a_killed_capture_that_is_asked_for_more_keeps_what_it_has(base, data, tokenizer, tmp_path, monkeypatch):
    """Another recipe goes on in the store of one that did not end; then the first one ends."""
    path, longer = tmp_path / "store", "source.max_length=64"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, capture_module, "score", 3)
        run(base, path, f"source.max_length={SHORT}")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, capture_module, "score", 2)
        run(base, path, longer)
    for override in (f"source.max_length={SHORT}", longer):
        run(base, path, override)
    whole = samples_of(data, tokenizer)
    StoreTeacher(path=str(path)).open(tokenizer, ALL).require([*whole, *samples_of(data, tokenizer, SHORT)])
    verify(path)
    before = files(path)
    run(base, path, longer)
    assert files(path) == before


def test_what_a_kill_left_half_written_is_removed(base, store):
    (store / ".shard-00004.parquet.12345.tmp").write_bytes(b"half")
    run(base, store)
    assert not list(store.glob(".*"))


@pytest.fixture
def long_recipe(base, tmp_path):
    """A recipe of many small shards, as a file."""
    rows = [conversation(i % 7, turns=1 + i % 3) | {"id": i} for i in range(240)]
    for i, row in enumerate(rows):
        row["messages"][0] = {"role": "user", "content": f"{row['messages'][0]['content']} {i}"}
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    tree = {**base, "source": base["source"] | {"data": str(data)}}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(tree))
    return file


def start(recipe, path, workers=1):
    command = [sys.executable, "-m"]
    if workers > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(workers), "--master-port", "0", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0", "-m"]
    command += ["limbeck", "--quiet", "capture", str(recipe), "--out", str(path)]
    # one thread: sums in another order are other bits
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=settings)


def ended(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-2000:]


def family(pid):
    """A process and all that it started: torchrun's workers are in sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [pid, *(member for child in found for member in family(child))]


def kill_at_random(recipe, path, workers, chance):
    """SIGKILL to all processes of a capture, at a random moment after its first file or its first shard; whether it was killed before its
    end."""
    pattern = chance.choice(["*", "*.parquet", "*.parquet"])
    before = set(path.glob(pattern))
    process = start(recipe, path, workers)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and set(path.glob(pattern)) <= before:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.15))
    if process.poll() is not None:
        return False
    for pid in family(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    return True


@pytest.mark.slow
@pytest.mark.parametrize("codec", [{"type": "exact"}, {"type": "quantized", "bytes_per_token": 24}])
def test_any_number_of_workers_writes_the_same_store(long_recipe, tmp_path, codec):
    tree = json.loads(long_recipe.read_text())
    long_recipe.write_text(json.dumps({**tree, "capture": tree["capture"] | {"codec": codec}}))
    ended(start(long_recipe, tmp_path / "one"))
    ended(start(long_recipe, tmp_path / "two", workers=2))
    assert len(read_manifest(tmp_path / "one").shards) == 120
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills", [3, pytest.param(20, marks=pytest.mark.skipif("LIMBECK_KILLS" not in os.environ, reason="takes minutes"))]
)
def test_kills_at_random_moments_change_nothing(long_recipe, tmp_path, kills):
    """Of one worker and of two in turn, so that a capture goes on with another number of them than it had."""
    ended(start(long_recipe, tmp_path / "straight"))
    chance, path, left = random.Random(kills), tmp_path / "killed", []
    while len(left) < kills:
        if kill_at_random(long_recipe, path, 1 + len(left) % 2, chance):
            left.append(len(list(path.glob("*.parquet"))))
        else:
            shutil.rmtree(path)  # it had ended: once more from the start
    ended(start(long_recipe, path))
    assert files(path) == files(tmp_path / "straight")
    verify(path)
    assert any(0 < number < 120 for number in left), left


# ---- full disks


def test_a_full_disk_is_named_and_what_was_written_stays_usable(base, captured, tmp_path, monkeypatch):
    path, real, count = tmp_path / "store", shard_module._footer, 0

    def full_at_the_second(file):
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(28, "No space left on device")
        return real(file)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match=r"shard-00001\.parquet: could not be written .*No space left"):
        patch.setattr(shard_module, "_footer", full_at_the_second)
        run(base, path)
    assert len(read_manifest(path).shards) == 1 and not list(path.glob(".*"))
    run(base, path)
    assert files(path) == files(captured)


def test_a_limit_on_file_sizes(tmp_path):
    """As real as a full disk, and needs no root."""
    rows = [Row(number, torch.arange(4).numpy(), 0, random.Random(number).randbytes(20_000), b"") for number in range(8)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        with pytest.raises(StoreError, match=r"shard-00000\.parquet: could not be written \(.*too large.*what was written before it stays"):
            write_shard(tmp_path / "shard-00000.parquet", rows, ())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == []


# ---- duplicates


def test_rows_that_are_there_twice_are_captured_once(base, data, tokenizer, tmp_path):
    doubled = write_jsonl(tmp_path / "doubled.jsonl", [*ROWS, *ROWS[:3]])
    manifest = run(base, tmp_path / "store", f"source.data={doubled}")
    assert manifest.num_samples == 7
    StoreTeacher(path=str(tmp_path / "store")).open(tokenizer, ALL).require(samples_of(doubled, tokenizer))


def test_a_shard_is_on_the_disk_before_it_gets_its_name(tmp_path, disk_order):
    for name, write in (
        ("head.safetensors", lambda file: writer_module.write_tensors(file, {"a": torch.zeros(3)})),
        ("shard-00000.parquet", lambda file: write_shard(file, [Row(1, torch.arange(2).numpy(), 0, b"ab", b"cd")], ())),
    ):
        disk_order.clear()
        write(tmp_path / name)
        temporary = f".{name}.{os.getpid()}.tmp"
        assert disk_order == [temporary, f"{temporary} > {name}", tmp_path.name]
        assert (tmp_path / name).stat().st_mode & 0o077 == 0o044, "others may read a capture"
