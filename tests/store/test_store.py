"""A capture gives back what the teacher said, by sample id and token offset; and nothing that was altered or is of something else."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import limbeck
from helpers import tiny_model, write_jsonl
from limbeck.errors import RecipeError, StoreError
from limbeck.objectives.base import Needs
from limbeck.objectives.head import Head
from limbeck.store import writer as writer_module
from limbeck.store.manifest import check_file, read_manifest
from limbeck.store.reader import StoreReader
from limbeck.store.writer import StoreWriter, write_head
from limbeck.teachers import ModelTeacher, StoreTeacher
from limbeck.tokens.datasets import read_conversations
from limbeck.tokens.pad import pad
from limbeck.tokens.render import render_all
from limbeck.tokens.sample import make_sample, sample_id_of

capture_module = importlib.import_module("limbeck.capture")  # `limbeck.capture` is the function

WORDS = ["weather", "Paris", "teacher", "student", "answer", "five", "fox", "dog", "sunny", "sleeps", "lazy", "quick"]
LAYERS = (1, 3)
SHORT = 24
"""A max_length that cuts most conversations and leaves each something to learn."""
ALL = Needs(output=True, layers=frozenset(LAYERS))


def conversation(i, turns=1):
    """A chat of some turns; each a different length."""
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": " ".join(WORDS[(i + turn) % 5 : 3 + i])},
            {"role": "assistant", "content": " ".join(WORDS[i % 4 : 5 + i + turn])},
        ]
    return {"messages": messages}


ROWS = [conversation(i, turns=1 + i % 2) for i in range(7)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", ROWS)


@pytest.fixture(scope="module")
def teacher_dir(make_model_dir):
    return make_model_dir(layers=4, width=48, seed=5)


@pytest.fixture(scope="module")
def base(data, teacher_dir):
    """A recipe that captures; tests change a copy of it."""
    return {
        "teacher": {"type": "model", "model": str(teacher_dir)},
        "source": {"type": "dataset", "data": str(data), "max_length": 64},
        "capture": {"layers": list(LAYERS), "samples_per_shard": 2, "batch_size": 2},
    }


@pytest.fixture(scope="module")
def captured(base, tmp_path_factory):
    """A whole capture. Read-only."""
    path = tmp_path_factory.mktemp("captures") / "store"
    limbeck.capture(base, [f"capture.path={path}"])
    return path


@pytest.fixture
def store(captured, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(captured, tmp_path / "store"))


def run(base, path, *overrides):
    return limbeck.capture(base, [f"capture.path={path}", *overrides])


def samples_of(data, tokenizer, max_length=64):
    return render_all(read_conversations(data), tokenizer, max_length)[0]


def signals(path, samples, tokenizer, needs=ALL, batch_size=1):
    """What the store says, by sample id: output, observed and hidden states."""
    scorer = StoreTeacher(path=str(path)).open(tokenizer, needs)
    found = {}
    for start in range(0, len(samples), batch_size):
        batch = pad(samples[start : start + batch_size], 0)
        signal = scorer.score(batch)
        ids = batch.sample_ids.flatten()
        for sample_id in ids[batch.represented].unique().tolist():
            scored, represented = ids[batch.scored] == sample_id, ids[batch.represented] == sample_id
            parts = [] if signal.output is None else [signal.output[scored]]
            parts += [signal.observed[scored], *(state[represented] for _, state in sorted(signal.hidden.items()))]
            found[sample_id] = parts
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for sample_id in a:
        assert len(a[sample_id]) == len(b[sample_id])
        assert all(torch.equal(x, y) for x, y in zip(a[sample_id], b[sample_id], strict=True))


def names(path):
    return sorted(file.name for file in path.iterdir())


# ---- what is read is what was written


def test_the_store_describes_itself(captured, teacher_dir, tokenizer):
    manifest = read_manifest(captured)
    assert (manifest.codec, manifest.layers, manifest.num_samples, manifest.vocabulary) == ("exact", LAYERS, 7, len(tokenizer))
    assert (manifest.teacher.num_layers, manifest.teacher.width, manifest.teacher.dtype) == (4, 48, "float32")
    assert [shard.num_samples for shard in manifest.shards] == [2, 2, 2, 1]
    assert names(captured) == ["head.safetensors", "manifest.json", *(f"shard-0000{i}.safetensors" for i in range(4))]
    assert manifest.num_bytes == sum(file.stat().st_size for file in captured.glob("*.safetensors"))
    assert {"torch", "transformers"} <= set(manifest.packages)


def test_counts_are_those_of_the_data(captured, data, tokenizer):
    manifest, samples = read_manifest(captured), samples_of(data, tokenizer)
    assert manifest.num_scored == sum(sample.num_scored for sample in samples)
    assert sum(shard.num_represented for shard in manifest.shards) == sum(len(sample.ids) for sample in samples)


def test_it_says_what_the_live_teacher_says(captured, teacher_dir, data, tokenizer):
    samples = samples_of(data, tokenizer)
    stored = StoreTeacher(path=str(captured)).open(tokenizer, ALL)
    live = ModelTeacher(model=str(teacher_dir)).open(tokenizer, ALL)
    assert (stored.num_layers, stored.width, stored.vocabulary) == (live.num_layers, live.width, live.vocabulary)
    for sample in samples:
        batch = pad([sample], 0)
        ours, theirs = stored.score(batch), live.score(batch)
        torch.testing.assert_close(ours.output, theirs.output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.teacher_head(ours.output), theirs.teacher_head(theirs.output), rtol=1e-5, atol=1e-5)
        assert ours.hidden.keys() == theirs.hidden.keys() == set(LAYERS)
        for layer in LAYERS:
            torch.testing.assert_close(ours.hidden[layer], theirs.hidden[layer], rtol=1e-5, atol=1e-5)
        log_probs = theirs.teacher_head(theirs.output).log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
        torch.testing.assert_close(ours.observed, log_probs, rtol=1e-5, atol=1e-5)


def test_the_batch_does_not_matter(captured, data, tokenizer):
    """By sample id and offset: any order, any batch size, and a sample twice in a batch."""
    samples = samples_of(data, tokenizer)
    one_by_one = signals(captured, samples, tokenizer)
    assert_same(signals(captured, samples[::-1], tokenizer, batch_size=3), one_by_one)
    assert_same(signals(captured, samples[3:] + samples[:3], tokenizer, batch_size=7), one_by_one)
    scorer = StoreTeacher(path=str(captured)).open(tokenizer, ALL)
    twice = scorer.score(pad([samples[0], samples[1], samples[0]], 0))
    output, hidden = one_by_one[samples[0].sample_id][0], one_by_one[samples[0].sample_id][2]
    assert torch.equal(twice.output[: len(output)], output) and torch.equal(twice.output[-len(output) :], output)
    assert torch.equal(twice.hidden[LAYERS[0]][-len(hidden) :], hidden)


def test_an_empty_microbatch(captured, tokenizer):
    signal = StoreTeacher(path=str(captured)).open(tokenizer, ALL).score(pad([], 0))
    assert signal.output.shape == (0, 48) and signal.observed.shape == (0,)
    assert all(state.shape == (0, 48) for state in signal.hidden.values())


@pytest.mark.parametrize("needs", [Needs(output=True), Needs(layers=frozenset({3})), Needs(layers=frozenset(LAYERS))])
def test_only_what_is_asked_for_is_given(captured, data, tokenizer, needs):
    signal = StoreTeacher(path=str(captured)).open(tokenizer, needs).score(pad(samples_of(data, tokenizer)[:2], 0))
    assert (signal.output is not None, signal.teacher_head is not None) == (needs.output, needs.output)
    assert signal.hidden.keys() == needs.layers
    assert signal.observed is not None


def test_capturing_in_other_batches_gives_the_same_ids_and_nearly_the_same_values(base, captured, data, tokenizer, tmp_path):
    run(base, tmp_path / "other", "capture.batch_size=7", "capture.samples_per_shard=100")
    samples = samples_of(data, tokenizer)
    ours, theirs = signals(tmp_path / "other", samples, tokenizer), signals(captured, samples, tokenizer)
    for sample_id in theirs:
        for a, b in zip(ours[sample_id], theirs[sample_id], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- lengths


def test_a_smaller_max_length_is_served(captured, data, tokenizer):
    whole, short = samples_of(data, tokenizer), samples_of(data, tokenizer, SHORT)
    assert any(len(a.ids) > len(b.ids) for a, b in zip(whole, short, strict=True))
    StoreTeacher(path=str(captured)).open(tokenizer, ALL).require(short)
    full, cut = signals(captured, whole, tokenizer), signals(captured, short, tokenizer, batch_size=4)
    for sample_id, parts in cut.items():
        assert all(torch.equal(part, whole_part[: len(part)]) for part, whole_part in zip(parts, full[sample_id], strict=True))


def test_a_larger_max_length_is_refused_with_the_share_that_is_missing(base, data, tokenizer, tmp_path):
    run(base, tmp_path / "short", f"source.max_length={SHORT}")
    whole, short = samples_of(data, tokenizer), samples_of(data, tokenizer, SHORT)
    scorer = StoreTeacher(path=str(tmp_path / "short")).open(tokenizer, Needs(output=True))
    lacking = sum(sample.num_scored for sample in whole) - sum(sample.num_scored for sample in short)
    total = sum(sample.num_scored for sample in whole)
    assert 0 < lacking < total
    with pytest.raises(StoreError) as caught:
        scorer.require(whole)
    assert f"lacks {lacking} of {total} tokens that this recipe asks for ({lacking / total:.1%})" in str(caught.value)
    with pytest.raises(StoreError, match="lacks 'output' of a token of sample"):
        scorer.score(pad([max(whole, key=lambda sample: len(sample.ids))], 0))


def test_capturing_longer_into_the_same_store_adds_what_is_missing(base, data, tokenizer, tmp_path):
    """Else the advice to capture again would lead nowhere."""
    path = tmp_path / "store"
    before = run(base, path, f"source.max_length={SHORT}")
    after = run(base, path)
    assert after.shards[: len(before.shards)] == before.shards and len(after.shards) > len(before.shards)
    whole = samples_of(data, tokenizer)
    StoreTeacher(path=str(path)).open(tokenizer, ALL).require(whole)
    run(base, tmp_path / "fresh")
    ours, fresh = signals(path, whole, tokenizer), signals(tmp_path / "fresh", whole, tokenizer)
    for sample_id in fresh:
        for a, b in zip(ours[sample_id], fresh[sample_id], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert run(base, path) == after


def test_other_data_is_missing_altogether(captured, data, tokenizer):
    scorer = StoreTeacher(path=str(captured)).open(tokenizer, Needs(output=True))
    stranger = make_sample([5, 6, 7, 8], [False, True, True, True], 64)
    with pytest.raises(StoreError, match=r"lacks 3 of 3 tokens .* \(100\.0%\)"):
        scorer.require([stranger])
    with pytest.raises(StoreError, match=f"lacks 'output' of a token of sample {stranger.sample_id}"):
        scorer.score(pad([stranger], 0))


def test_a_token_that_was_context_at_capture_is_missing(captured, data, tokenizer):
    """The same ids with other targets: another template's mask, say."""
    sample = samples_of(data, tokenizer)[0]
    more = make_sample(sample.ids.tolist(), [True] * len(sample.ids), 64)
    assert more.sample_id == sample.sample_id
    scorer = StoreTeacher(path=str(captured)).open(tokenizer, Needs(output=True))
    with pytest.raises(StoreError, match=f"lacks {more.num_scored - sample.num_scored} of {more.num_scored} tokens"):
        scorer.require([more])
    with pytest.raises(StoreError, match="lacks 'output' of a token"):
        scorer.score(pad([more], 0))


# ---- layers


def test_layers_that_were_not_captured_are_refused(captured, tokenizer):
    with pytest.raises(StoreError, match=r"holds the states of blocks \[1, 3\], this recipe needs \[0, 2\] too"):
        StoreTeacher(path=str(captured)).open(tokenizer, Needs(layers=frozenset({0, 1, 2})))


def test_samples_that_were_captured_without_states_are_missing_where_states_are_needed(base, tmp_path, tokenizer):
    """Held-out texts are captured for their output alone."""
    heldout = write_jsonl(tmp_path / "heldout.jsonl", [conversation(9)])
    path = tmp_path / "store"
    run({**base, "evaluate": [{"type": "agreement", "data": str(heldout)}]}, path)
    samples = samples_of(heldout, tokenizer, 1024)
    StoreTeacher(path=str(path)).open(tokenizer, Needs(output=True)).require(samples)
    lacking = len(samples[0].ids)
    with pytest.raises(StoreError, match=f"lacks {lacking} of {lacking + samples[0].num_scored} tokens"):
        StoreTeacher(path=str(path)).open(tokenizer, ALL).require(samples)
    with pytest.raises(StoreError, match=r"lacks 'hidden\.1' of a token"):
        StoreTeacher(path=str(path)).open(tokenizer, ALL).score(pad(samples, 0))


@pytest.mark.parametrize(("trained", "graded"), [(SHORT, 64), (64, SHORT)])
def test_a_text_that_is_trained_on_and_evaluated_at_another_length_serves_both(base, data, tokenizer, tmp_path, trained, graded):
    """One sample id, asked for with states up to one length and without them up to another."""
    path = tmp_path / "store"
    asks = {**base, "evaluate": [{"type": "agreement", "data": str(data), "max_length": graded}]}
    assert run(asks, path, f"source.max_length={trained}").num_samples == 7
    StoreTeacher(path=str(path)).open(tokenizer, ALL).require(samples_of(data, tokenizer, trained))
    StoreTeacher(path=str(path)).open(tokenizer, Needs(output=True)).require(samples_of(data, tokenizer, graded))


def test_what_is_asked_of_a_sample_in_several_places_is_asked_once():
    ids = [3, 4, 5, 6]
    short, long = make_sample(ids, [False, True, False, False], 3), make_sample(ids, [False, False, False, True], 4)
    other = make_sample([9, 9], [False, True], 4)
    for groups in ([([short, other], ALL), ([long], Needs(output=True))], [([long], Needs(output=True)), ([short, other], ALL)]):
        (first, needs), (both, all_needs) = capture_module._once(groups)
        assert first.sample_id == other.sample_id and needs == all_needs == ALL
        assert both.ids.tolist() == ids and both.is_target.tolist() == [False, True, False, True]


# ---- other tokenizers


def test_another_tokenizer_is_refused_by_name_of_the_field(captured, fresh_tokenizer):
    fresh_tokenizer.add_tokens(["something new"])
    with pytest.raises(StoreError, match=r"captured with vocabulary_hash \w{12}, the student's tokenizer has \w{12}"):
        StoreTeacher(path=str(captured)).open(fresh_tokenizer, ALL)


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", None])
def test_another_template_is_refused_by_name_of_the_field(captured, fresh_tokenizer, template):
    fresh_tokenizer.chat_template = template
    with pytest.raises(StoreError, match="captured with template_hash"):
        StoreTeacher(path=str(captured)).open(fresh_tokenizer, ALL)


# ---- damage


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize("name", ["shard-00001.safetensors", "head.safetensors"])
def test_an_altered_file_is_named(store, tokenizer, base, damage, name):
    damage(store / name)
    with pytest.raises(StoreError, match=rf"{name}: found \d+ bytes with SHA-256 \w{{12}}, expected \d+ with \w{{12}}: .*cut or altered"):
        StoreTeacher(path=str(store)).open(tokenizer, ALL)
    with pytest.raises(StoreError, match=f"{name}: found"):
        run(base, store)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "head.safetensors"])
def test_a_missing_file_is_named(store, tokenizer, base, name):
    (store / name).unlink()
    with pytest.raises(StoreError, match=rf"{name}: missing; expected \d+ bytes"):
        StoreTeacher(path=str(store)).open(tokenizer, ALL)
    with pytest.raises(StoreError, match=f"{name}: missing"):
        run(base, store)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "sub/shard.safetensors", "..", ""])
@pytest.mark.parametrize("where", ["shards", "head"])
def test_names_do_not_lead_out_of_the_store(store, tokenizer, name, where):
    """A store from somebody else must not make us read another file, not even one that has the right checksum."""
    (store.parent / "secret.safetensors").write_bytes((store / "shard-00000.safetensors").read_bytes())
    tree = json.loads((store / "manifest.json").read_text())
    (tree["shards"][0] if where == "shards" else tree["head"])["name"] = name
    (store / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(StoreError, match=r"leads out of the store|missing"):
        StoreTeacher(path=str(store)).open(tokenizer, ALL)
    if "/" in name:
        with pytest.raises(StoreError, match=r"manifest\.json: file name .* leads out of the store"):
            check_file(store, read_manifest(store).head if where == "head" else read_manifest(store).shards[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format: found 'other'"),
        ({"version": 2}, "version: found 2"),
        ({"codec": "top_k"}, "codec: found 'top_k'"),
        ({"layers": "all"}, "layers: found 'all'"),
        ({"surprise": 1}, "surprise: unknown key"),
        ({"teacher": {}}, "teacher.name: missing"),
    ],
)
def test_a_manifest_of_another_kind_is_refused_by_key(store, change, message):
    tree = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(tree | change))
    with pytest.raises(StoreError, match=r"manifest\.json: not a manifest of this version of Limbeck") as caught:
        StoreTeacher(path=str(store)).provides()
    assert message in str(caught.value)


def test_a_teacher_in_a_type_that_does_not_exist(store):
    tree = json.loads((store / "manifest.json").read_text())
    tree["teacher"]["dtype"] = "float8"
    (store / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(StoreError, match=r"teacher\.dtype: found 'float8', expected 'float32' or 'bfloat16'"):
        read_manifest(store)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null"])
def test_a_broken_manifest(store, content):
    (store / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"manifest\.json: not a manifest"):
        StoreTeacher(path=str(store)).provides()


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(StoreError, match=r"found no manifest\.json, expected a folder written by `limbeck capture`"):
        StoreTeacher(path=str(tmp_path)).provides()


# ---- capturing again


def test_the_same_capture_again_does_nothing(base, store, monkeypatch):
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in store.iterdir()}
    monkeypatch.setattr(capture_module, "_score", lambda *args: pytest.fail("scored again"))
    run(base, store)
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in store.iterdir()} == before


def test_the_same_teacher_under_another_path_is_the_same(base, store, teacher_dir, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(teacher_dir)
    monkeypatch.setattr(capture_module, "_score", lambda *args: pytest.fail("scored again"))
    run(base, store, f"teacher.model={tmp_path / 'link'}")


@pytest.mark.parametrize(
    ("override", "field"),
    [("capture.layers=[1]", r"layers is \(1, 3\), this recipe needs \(1,\)"), ("teacher.dtype=bfloat16", "teacher.dtype is 'float32'")],
)
def test_another_capture_in_the_same_place_is_refused_by_field(base, store, override, field):
    before = (store / "manifest.json").read_bytes()
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


@pytest.mark.parametrize("change", [{"capture": None}, {"teacher": {"type": "none"}}])
def test_what_cannot_be_captured_is_said_before_anything_loads(base, change, monkeypatch):
    monkeypatch.setattr(capture_module, "load_tokenizer", lambda *args: pytest.fail("loaded something"))
    tree = {**base, "capture": {"path": "store"}, **change}
    with pytest.raises(RecipeError, match=r"^(capture: missing|teacher\.type: found 'none', expected 'model')"):
        limbeck.capture(tree)


# ---- kills


class Killed(BaseException):
    pass


def die_at(monkeypatch, number):
    """Raise at the given tensor file, after it was written and before it has its name."""
    real, count = writer_module.save_file, 0

    def counted(tensors, file):
        nonlocal count
        real(tensors, file)
        count += 1
        if count == number:
            raise Killed

    monkeypatch.setattr(writer_module, "save_file", counted)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_killed_capture_goes_on_where_it_was(base, captured, data, tokenizer, tmp_path, monkeypatch, number):
    path = tmp_path / "store"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, number)
        run(base, path)
    kept = len(read_manifest(path).shards) if (path / "manifest.json").is_file() else 0
    assert kept == max(number - 2, 0)
    scored = []
    real = capture_module._score
    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "_score", lambda *args: (scored.extend(args[2]), real(*args)))
        run(base, path)
    assert len(scored) == 7 - 2 * kept, "only what was not written is scored again"
    samples = samples_of(data, tokenizer)
    assert_same(signals(path, samples, tokenizer), signals(captured, samples, tokenizer))
    assert names(path) == names(captured)


def test_a_kill_between_shard_and_manifest(base, captured, data, tokenizer, tmp_path, monkeypatch):
    """The shard has its name and nobody knows it: it is written again."""
    path, real, count = tmp_path / "store", writer_module.write_manifest, 0

    def die_at_the_third(folder, manifest):
        nonlocal count
        count += 1
        if count == 3:
            raise Killed
        real(folder, manifest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(writer_module, "write_manifest", die_at_the_third)
        run(base, path)
    assert names(path) == ["head.safetensors", "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    assert len(read_manifest(path).shards) == 1
    run(base, path)
    samples = samples_of(data, tokenizer)
    assert_same(signals(path, samples, tokenizer), signals(captured, samples, tokenizer))


def test_what_a_kill_left_half_written_is_removed(base, store):
    (store / ".shard-00004.safetensors.12345.tmp").write_bytes(b"half")
    run(base, store)
    assert not list(store.glob(".*"))


def test_a_full_disk_is_named_and_what_was_written_stays_usable(base, captured, data, tokenizer, tmp_path, monkeypatch):
    path, real, count = tmp_path / "store", writer_module.save_file, 0

    def full_at_the_third(tensors, file):
        nonlocal count
        count += 1
        if count == 3:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, file)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match=r"shard-00001\.safetensors: could not be written .*No space left"):
        patch.setattr(writer_module, "save_file", full_at_the_third)
        run(base, path)
    assert names(path) == ["head.safetensors", "manifest.json", "shard-00000.safetensors"]
    run(base, path)
    samples = samples_of(data, tokenizer)
    assert_same(signals(path, samples, tokenizer), signals(captured, samples, tokenizer))


# ---- duplicates


def test_rows_that_are_there_twice_are_captured_once(base, data, tokenizer, tmp_path):
    doubled = write_jsonl(tmp_path / "doubled.jsonl", [*ROWS, *ROWS[:3]])
    manifest = run(base, tmp_path / "store", f"source.data={doubled}")
    assert manifest.num_samples == 7
    StoreTeacher(path=str(tmp_path / "store")).open(tokenizer, ALL).require(samples_of(doubled, tokenizer))


def test_the_writer_takes_a_sample_once_also_where_a_batch_holds_it_twice(captured, teacher_dir, data, tokenizer, tmp_path):
    sample, other = samples_of(data, tokenizer)[:2]
    identity = read_manifest(captured).model_copy(update={"shards": ()})
    shutil.copytree(captured, tmp_path / "store", ignore=shutil.ignore_patterns("shard*", "manifest*"))
    writer = StoreWriter(tmp_path / "store", identity)
    batch = pad([sample, other, sample], 0)
    scorer = ModelTeacher(model=str(teacher_dir)).open(tokenizer, ALL)
    capture_module._score(scorer, writer, [sample, other, sample], 0)
    capture_module._score(scorer, writer, [sample], 0)
    writer.flush()
    assert read_manifest(tmp_path / "store").num_scored == sample.num_scored + other.num_scored
    signal = StoreTeacher(path=str(tmp_path / "store")).open(tokenizer, ALL).score(batch)
    torch.testing.assert_close(signal.output, scorer.score(batch).output, rtol=1e-5, atol=1e-5)


# ---- the head


def test_a_head_of_bf16_numbers_is_kept_in_bf16_and_comes_back_exactly(base, data, tokenizer, tmp_path):
    """A float32 copy of weights that were published in bf16: half the size, not one bit lost."""
    from helpers import save_model

    model = tiny_model(layers=4, width=48, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    short = save_model(tmp_path / "model", model, tokenizer)
    run(base, tmp_path / "store", f"teacher.model={short}")
    assert load_file(tmp_path / "store" / "head.safetensors")["weight"].dtype == torch.bfloat16
    head = StoreReader(tmp_path / "store").head()
    assert head.weight.dtype == torch.float32
    assert torch.equal(head.weight, model.lm_head.weight[: len(tokenizer)])


def test_a_head_of_other_numbers_is_kept_as_it_is(captured, teacher_dir, tokenizer):
    assert load_file(captured / "head.safetensors")["weight"].dtype == torch.float32
    assert torch.equal(
        StoreReader(captured).head().weight, load_file(teacher_dir / "model.safetensors")["model.embed_tokens.weight"][: len(tokenizer)]
    )


def test_bias_factor_and_soft_cap_come_back(captured, store):
    head = Head(torch.randn(6, 48), torch.randn(6), scale=0.5, soft_cap=30.0)
    stored = write_head(store, head)
    manifest = read_manifest(captured)
    teacher = manifest.teacher.model_copy(update={"head_scale": 0.5, "head_soft_cap": 30.0})
    writer_module.write_manifest(store, manifest.model_copy(update={"head": stored, "teacher": teacher}))
    rows = torch.randn(3, 48)
    assert torch.equal(StoreReader(store).head()(rows), head(rows))


def test_a_bf16_teacher_is_stored_and_applied_in_bf16(base, data, tokenizer, tmp_path):
    run(base, tmp_path / "store", "teacher.dtype=bfloat16")
    samples = samples_of(data, tokenizer)
    live = ModelTeacher(model=base["teacher"]["model"], dtype="bfloat16").open(tokenizer, ALL)
    stored = StoreTeacher(path=str(tmp_path / "store")).open(tokenizer, ALL)
    batch = pad(samples[:1], 0)
    ours, theirs = stored.score(batch), live.score(batch)
    assert ours.output.dtype == ours.hidden[1].dtype == stored.head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(ours.teacher_head(ours.output), theirs.teacher_head(theirs.output), rtol=3e-2, atol=3e-2)
    assert stored.score(pad([], 0)).output.dtype == torch.bfloat16


# ---- through the whole walk


def test_sample_ids_do_not_depend_on_truncation(data, tokenizer):
    whole, short = samples_of(data, tokenizer), samples_of(data, tokenizer, SHORT)
    assert [sample.sample_id for sample in whole] == [sample.sample_id for sample in short]
    assert whole[1].sample_id == sample_id_of(whole[1].ids) != sample_id_of(short[1].ids)
    assert len({sample.sample_id for sample in whole}) == len(whole)


def test_shards_are_plain_safetensors(captured, tmp_path):
    shard = load_file(captured / "shard-00000.safetensors")
    assert set(shard) == {"sample_id", "offset", "output", "observed", "scored_starts", "represented_starts", "hidden.1", "hidden.3"}
    save_file(shard, tmp_path / "again.safetensors")
    assert (captured / "shard-00000.safetensors").stat().st_mode & 0o077 == 0o044, "others may read a capture"


def test_a_shard_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    replace, fsync, seen = os.replace, os.fsync, []

    def synced(descriptor):
        seen.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def replaced(source, target):
        seen.append(f"{source.name} > {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    writer_module.write_tensors(tmp_path / "shard.safetensors", {"a": torch.zeros(3)})
    temporary = f".shard.safetensors.{os.getpid()}.tmp"
    assert seen == [temporary, f"{temporary} > shard.safetensors", tmp_path.name]
