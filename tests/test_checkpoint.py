"""A checkpoint is there whole or not at all, holds every bit that a resume needs, and is not believed when it was altered."""

from __future__ import annotations

import json
import os
import resource
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from helpers import tiny_model
from limbeck import checkpoint
from limbeck.batch import Signal
from limbeck.errors import RunError
from limbeck.learner import Learner
from limbeck.objectives import CrossEntropy, Hidden
from limbeck.optim import Optimizer, build
from limbeck.tokens.pad import pad
from limbeck.tokens.sample import make_sample

VOCABULARY = 100
TEACHER_WIDTH = 24


def make(seed=0, layers=2, tied=True, projections=True, width=32):
    """A learner with tied embeddings and trained projections, and its optimizer."""
    terms = {"ce": CrossEntropy(), **({"hidden": Hidden(pairs=[(0, 0), (1, 2)])} if projections else {})}
    model = tiny_model(tied=tied, layers=layers, width=width, vocab=VOCABULARY, seed=seed)
    learner = Learner(model, terms, VOCABULARY, teacher_layers=4, teacher_width=TEACHER_WIDTH, seed=seed)
    return learner, build(Optimizer(weight_decay=0.1), learner)


def train(learner, optimizer, steps):
    """A few real steps, a function of the step number alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(VOCABULARY, (6,), generator=generator).tolist()
        batch = pad([make_sample(ids, [True] * 6, 6)], 0)
        hidden = {layer: torch.randn(6, TEACHER_WIDTH, generator=generator) for layer in (0, 2)} if learner.hidden_terms else {}
        loss, _ = learner(batch, Signal(hidden=hidden), {"ce": 1.0, "hidden": 1.0})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def bits(learner, optimizer):
    """All that training changes, by name."""
    found = {name: value.detach().clone() for name, value in learner.named_parameters()}
    for name, parameter in learner.named_parameters():
        found |= {f"{name} {key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.fixture
def trained():
    learner, optimizer = make()
    train(learner, optimizer, range(2))
    return learner, optimizer


def save(root, step, pair, keep=9, **state):
    return checkpoint.save(root, step, *pair, state, keep)


def names(root):
    return sorted(path.name for path in root.iterdir())


# ---- round trip


def test_round_trip_is_exact_to_the_bit(tmp_path, trained):
    expected = bits(*trained)
    assert len(trained[0].projections["hidden"]) == 2  # else nothing is said of them
    assert sum("exp_avg_sq" in name for name in expected) == sum(1 for _ in trained[0].parameters())
    path = save(tmp_path, 2, trained, tokens=12, seconds=0.1 + 0.2)
    assert path == tmp_path / "step-00000002"
    fresh = make(seed=5)
    assert not torch.equal(fresh[0].student.lm_head.weight, trained[0].student.lm_head.weight)
    assert checkpoint.load_latest(tmp_path, *fresh) == {"step": 2, "tokens": 12, "seconds": 0.1 + 0.2}
    assert_equal(bits(*fresh), expected)
    assert fresh[0].student.lm_head.weight is fresh[0].student.model.embed_tokens.weight


def test_a_resumed_run_takes_the_same_steps(tmp_path, trained):
    save(tmp_path, 2, trained)
    train(*trained, range(2, 5))
    resumed = make(seed=5)
    checkpoint.load_latest(tmp_path, *resumed)
    train(*resumed, range(2, 5))
    assert_equal(bits(*resumed), bits(*trained))


def test_saving_changes_nothing(tmp_path, trained):
    before = bits(*trained)
    save(tmp_path, 2, trained)
    assert_equal(bits(*trained), before)


def test_untied_weights_without_projections(tmp_path):
    pair = make(tied=False, projections=False)
    train(*pair, range(1))
    save(tmp_path, 1, pair)
    fresh = make(seed=3, tied=False, projections=False)
    checkpoint.load_latest(tmp_path, *fresh)
    assert_equal(bits(*fresh), bits(*pair))


def test_a_checkpoint_before_the_first_step(tmp_path):
    pair = make()
    save(tmp_path, 0, pair)
    fresh = make(seed=1)
    assert checkpoint.load_latest(tmp_path, *fresh) == {"step": 0}
    assert not fresh[1].state


def test_persistent_buffers_are_kept(tmp_path, trained):
    for value, (learner, _) in ((3.0, trained), (0.0, other := make(seed=1))):
        learner.register_buffer("seen", torch.tensor([value]))
    save(tmp_path, 2, trained)
    checkpoint.load_latest(tmp_path, *other)
    assert other[0].seen.item() == 3.0


def test_nothing_to_load(tmp_path):
    assert checkpoint.load_latest(tmp_path, *make()) is None
    assert checkpoint.load_latest(tmp_path / "none", *make()) is None


def test_no_code_can_be_in_it(tmp_path, trained):
    assert names(save(tmp_path, 2, trained)) == ["learner.safetensors", "manifest.json", "optimizer.safetensors", "state.json"]


# ---- retention


@pytest.mark.parametrize(("keep", "left"), [(0, [3]), (1, [3]), (2, [2, 3]), (9, [1, 2, 3])])
def test_the_newest_are_kept(tmp_path, trained, keep, left):
    for step in (1, 2, 3):
        save(tmp_path, step, trained, keep=keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_the_old_one_goes_only_after_the_new_one_is_there(tmp_path, trained, monkeypatch):
    save(tmp_path, 1, trained, keep=1)
    remove, seen = checkpoint.remove, []
    monkeypatch.setattr(checkpoint, "remove", lambda path: (seen.append((path.name, names(tmp_path))), remove(path)))
    save(tmp_path, 2, trained, keep=1)
    assert ("step-00000001", ["step-00000001", "step-00000002"]) in seen


def test_steps_of_many_digits_are_in_order(tmp_path, trained):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, trained, keep=1)
    assert checkpoint.load_latest(tmp_path, *make()) == {"step": 100_000_000}


def test_a_checkpoint_is_not_deleted_for_a_damaged_later_one(tmp_path, trained):
    """Resumed from 2 after 8 was found damaged, the run saves 4: with `keep` 1 that is the one to keep."""
    for step in (2, 8):
        save(tmp_path, step, trained)
    flip(tmp_path / "step-00000008" / "learner.safetensors")
    save(tmp_path, 4, trained, keep=1)
    assert names(tmp_path) == ["step-00000004"]
    assert checkpoint.load_latest(tmp_path, *make()) == {"step": 4}


def test_saving_a_step_again_replaces_it(tmp_path, trained):
    save(tmp_path, 2, trained, note="old")
    train(*trained, range(2, 3))
    save(tmp_path, 2, trained, note="new")
    fresh = make(seed=5)
    assert checkpoint.load_latest(tmp_path, *fresh) == {"step": 2, "note": "new"}
    assert_equal(bits(*fresh), bits(*trained))
    assert names(tmp_path) == ["step-00000002"]


# ---- damage


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


DAMAGE = [
    (damage, name)
    for name in ("learner.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
    for damage in (flip, truncate, empty, Path.unlink)
]


@pytest.mark.parametrize(("damage", "name"), DAMAGE, ids=[f"{damage.__name__}-{name}" for damage, name in DAMAGE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used_if_told_so(tmp_path, trained, damage, name):
    """Whoever deletes it has said so: a run that went back by itself would hide that a disk is failing."""
    save(tmp_path, 2, trained)
    expected = bits(*trained)
    train(*trained, range(2, 4))
    damaged = save(tmp_path, 4, trained)
    damage(damaged / name)
    fresh = make(seed=5)
    before = bits(*fresh)
    with pytest.raises(RunError, match=rf"step-00000004: damaged: {name} .*Delete this folder to go on from step-00000002$"):
        checkpoint.load_latest(tmp_path, *fresh)
    assert_equal(bits(*fresh), before)
    checkpoint.remove(damaged)
    assert checkpoint.load_latest(tmp_path, *fresh) == {"step": 2}
    assert_equal(bits(*fresh), expected)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"state.json": 3}', '{"../../etc/passwd": {}}'])
def test_a_manifest_that_says_something_else(tmp_path, trained, text):
    (save(tmp_path, 2, trained) / "manifest.json").write_text(text)
    with pytest.raises(RunError, match=r"step-00000002: damaged: .*Delete this folder to go on from the beginning"):
        checkpoint.load_latest(tmp_path, *make())


@pytest.mark.parametrize("name", ["learner.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04N.", b'{"step": "two"}', b"\xff" * 99])
def test_other_content_with_the_right_checksum(tmp_path, trained, name, content):
    """Whoever writes the file can write the manifest."""
    path = save(tmp_path, 2, trained)
    (path / name).write_bytes(content)
    files = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**files, name: checkpoint._describe(path / name)}))
    with pytest.raises(RunError, match=r"step-00000002: (damaged: not what a checkpoint holds|holds other weights)"):
        checkpoint.load_latest(tmp_path, *make(seed=5))


def test_a_file_in_the_place_of_a_checkpoint(tmp_path, trained):
    save(tmp_path, 2, trained)
    (tmp_path / "step-00000009").write_text("?")
    with pytest.raises(RunError, match="step-00000009: damaged: "):
        checkpoint.load_latest(tmp_path, *make())


# ---- kills


def test_a_kill_while_saving_publishes_nothing(tmp_path, trained, monkeypatch):
    save(tmp_path, 2, trained, keep=1)
    real, calls = checkpoint.save_file, []

    def die_at_the_second_file(tensors, file):
        calls.append(file)
        real(tensors, file)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", die_at_the_second_file)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4, trained, keep=1)
    monkeypatch.undo()
    assert "step-00000004" not in names(tmp_path)
    assert checkpoint.load_latest(tmp_path, *make()) == {"step": 2}
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["step-00000002"]
    save(tmp_path, 4, trained, keep=1)
    assert names(tmp_path) == ["step-00000004"]


def test_a_kill_at_any_moment_of_a_save_leaves_a_checkpoint(tmp_path, trained, monkeypatch):
    """Every system call that changes the folder is a moment; nothing after it happens."""

    class Killed(BaseException):
        pass

    def run(root, fatal):
        """Saves 1 and 2 with `keep` 1, dying at the change number `fatal` of the second; says how many changes there were."""
        save(root, 1, trained, keep=1)
        count = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == fatal:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in (
                (checkpoint, "save_file"),
                (Path, "write_text"),
                (Path, "rename"),
                (os, "fsync"),
                (checkpoint.shutil, "rmtree"),
            ):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            with suppress(Killed):
                save(root, 2, trained, keep=1)
        return count

    total = run(tmp_path / "whole", fatal=0)
    assert total > 10
    for fatal in range(1, total + 1):
        root = tmp_path / str(fatal)
        run(root, fatal)
        assert checkpoint.load_latest(root, *make())["step"] in (1, 2), fatal
        checkpoint.clean(root)
        assert not [name for name in names(root) if ".tmp" in name]


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, trained, disk_order):
    """A name that outlives a power failure and its content would be a checkpoint of zeros."""
    disk_order.clear()
    path = save(tmp_path, 2, trained)
    before, after = disk_order[:-2], disk_order[-2:]
    assert sorted(before) == sorted([*names(path), f"{path.name}.tmp"])
    assert after == [f"{path.name}.tmp > {path.name}", tmp_path.name]


def test_a_kill_while_deleting_leaves_no_half_checkpoint_under_a_valid_name(tmp_path, trained, monkeypatch):
    path = save(tmp_path, 2, trained)

    def die_half_way(folder, **options):
        if not Path(folder).exists():
            return
        (Path(folder) / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", die_half_way)
        checkpoint.remove(path)
    assert not path.exists()
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("leftover", ["step-00000004.tmp", "step-00000004.tmp-old"])
def test_what_a_kill_leaves_is_no_checkpoint_and_can_be_cleaned(tmp_path, trained, leftover):
    path = save(tmp_path, 4, trained)
    path.rename(tmp_path / leftover)
    assert checkpoint.load_latest(tmp_path, *make()) is None
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == []


def test_cleaning_spares_all_else(tmp_path, trained):
    save(tmp_path, 2, trained)
    (tmp_path / "notes.tmp").write_text("mine")
    checkpoint.clean(tmp_path)
    checkpoint.clean(tmp_path / "none")
    assert names(tmp_path) == ["notes.tmp", "step-00000002"]


# ---- other recipes


@pytest.mark.parametrize("settings", [{"layers": 3}, {"tied": False}, {"projections": False}, {"width": 16}], ids=str)
def test_weights_of_another_recipe_are_refused(tmp_path, trained, settings):
    save(tmp_path, 2, trained)
    other = make(seed=5, **settings)
    before = bits(*other)
    with pytest.raises(RunError, match=r"step-00000002: holds other weights than this recipe's student and projections"):
        checkpoint.load_latest(tmp_path, *other)
    assert_equal(bits(*other), before)


# ---- a full disk


def test_a_full_disk_stops_with_a_message_and_leaves_the_earlier_ones(tmp_path, trained, monkeypatch):
    save(tmp_path, 2, trained, keep=1)

    def full(tensors, file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        RunError, match=r"step-00000004: the checkpoint could not be written \(.*No space left.*earlier checkpoints are untouched"
    ):
        save(tmp_path, 4, trained, keep=1)
    assert names(tmp_path) == ["step-00000002"]
    assert checkpoint.load_latest(tmp_path, *make()) == {"step": 2}


def test_a_folder_that_cannot_be_made(tmp_path, trained):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="the checkpoint could not be written"):
        save(tmp_path / "file" / "checkpoints", 2, trained)


def test_a_real_limit_on_file_size(tmp_path, trained):
    """The system call itself fails here, in safetensors' own writer."""
    save(tmp_path, 2, trained, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RunError, match=r"the checkpoint could not be written .*earlier checkpoints are untouched") as caught:
            save(tmp_path, 4, trained, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "too large" in str(caught.value)
    assert names(tmp_path) == ["step-00000002"]
    assert checkpoint.load_latest(tmp_path, *make()) == {"step": 2}


def test_state_is_json(tmp_path, trained):
    path = save(tmp_path, 2, trained, tokens=7)
    assert json.loads((path / "state.json").read_text()) == {"step": 2, "tokens": 7}
