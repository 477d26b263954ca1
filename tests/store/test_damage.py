"""What was cut, altered or lost is found and named, and can be captured again; a manifest that says something else is refused."""

from __future__ import annotations

import importlib
import json

import pytest
from captures import ALL, SHORT, assert_same, run, samples_of, signals

from limbeck.errors import StoreError
from limbeck.store.manifest import read_manifest
from limbeck.store.verify import damages, verify
from limbeck.teachers import StoreTeacher
from limbeck.tokens.pad import pad

capture_module = importlib.import_module("limbeck.capture")  # `limbeck.capture` is the function

# ---- damage


def flip(file, at=-20):
    """One bit: near the end, in a shard's index; or in the middle, in what was said of some sample."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def flip_middle(file):
    flip(file, at=file.stat().st_size // 3)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-3])


def read_all(store, data, tokenizer):
    scorer = StoreTeacher(path=str(store)).open(tokenizer, ALL)
    for sample in samples_of(data, tokenizer):
        scorer.score(pad([sample], 0))


@pytest.mark.parametrize("damage", [flip, flip_middle, truncate])
@pytest.mark.parametrize("name", ["shard-00001.parquet", "head.safetensors"])
def test_an_altered_file_is_named(store, tokenizer, base, data, damage, name):
    damage(store / name)
    with pytest.raises(StoreError, match=rf"{name}: .*the file was (cut or )?altered.*`limbeck store repair RECIPE` captures again"):
        read_all(store, data, tokenizer)
    with pytest.raises(StoreError, match=rf"{name}: found"):
        verify(store)
    if damage is not flip_middle or name.startswith("head"):
        with pytest.raises(StoreError, match=f"{name}: found"):
            run(base, store)


@pytest.mark.parametrize("name", ["shard-00001.parquet", "head.safetensors"])
def test_a_missing_file_is_named(store, tokenizer, base, name):
    (store / name).unlink()
    with pytest.raises(StoreError, match=rf"{name}: missing; expected \d+ bytes"):
        StoreTeacher(path=str(store)).open(tokenizer, ALL)
    with pytest.raises(StoreError, match=rf"{name}: missing"):
        verify(store)


def test_no_byte_of_a_shard_can_change_unnoticed(base, store, data, tokenizer):
    """Every part of the format in turn: page headers, pages, the index, the footer, its length, the magic words."""
    file, content = store / "shard-00001.parquet", (store / "shard-00001.parquet").read_bytes()
    before = signals(store, samples_of(data, tokenizer), tokenizer)
    for at in range(0, len(content), max(len(content) // 150, 1)):
        flip(file, at)
        assert [damage.name for damage in damages(store)] == [file.name]
        try:
            assert_same(signals(store, samples_of(data, tokenizer), tokenizer), before)
        except StoreError as error:
            assert file.name in str(error)
        file.write_bytes(content)


def test_all_that_is_damaged_is_named_at_once(store):
    flip(store / "shard-00000.parquet")
    (store / "shard-00002.parquet").unlink()
    truncate(store / "head.safetensors")
    assert [damage.name for damage in damages(store)] == ["head.safetensors", "shard-00000.parquet", "shard-00002.parquet"]
    with pytest.raises(StoreError) as caught:
        verify(store)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("damage", [flip, flip_middle, truncate, lambda file: file.unlink()])
@pytest.mark.parametrize("name", ["shard-00001.parquet", "head.safetensors"])
def test_repair_captures_what_is_damaged_and_leaves_the_rest_alone(base, store, captured, damage, name, monkeypatch):
    damage(store / name)
    untouched = {file.name: file.stat().st_mtime_ns for file in store.iterdir() if file.name not in (name, "manifest.json")}
    scored, real = [], capture_module.score
    monkeypatch.setattr(capture_module, "score", lambda *args: (scored.extend(args[1]), real(*args))[1])
    found, manifest = capture_module.repair(base, [f"capture.path={store}"])
    assert [damage.name for damage in found] == [name] and manifest == read_manifest(captured)
    assert len(scored) == (2 if name.startswith("shard") else 0)
    assert {file.name: file.read_bytes() for file in store.iterdir()} == {file.name: file.read_bytes() for file in captured.iterdir()}
    assert untouched == {name: (store / name).stat().st_mtime_ns for name in untouched}


def test_repair_of_a_shard_that_another_recipe_made(base, data, tokenizer, tmp_path):
    """What this recipe needs of it is captured anew; the rest of it is gone, as the recipe of it could say."""
    path = tmp_path / "store"
    run(base, path, f"source.max_length={SHORT}")
    run(base, path)
    flip(path / "shard-00000.parquet")
    capture_module.repair(base, [f"capture.path={path}"])
    verify(path)
    StoreTeacher(path=str(path)).open(tokenizer, ALL).require(samples_of(data, tokenizer))


def test_repair_wants_a_store(base, tmp_path):
    with pytest.raises(StoreError, match=r"found no manifest\.json"):
        capture_module.repair(base, [f"capture.path={tmp_path / 'new'}"])


def test_a_capture_that_has_not_ended_is_read_as_far_as_it_is(base, store, data, tokenizer):
    """A kill leaves entries beside the shards, and a shard that nobody knows."""
    tree = json.loads((store / "manifest.json").read_text())
    for shard in tree["shards"][1:3]:
        (store / shard["name"].replace(".parquet", ".json")).write_text(json.dumps(shard))
    tree["shards"] = tree["shards"][:1]
    (store / "manifest.json").write_text(json.dumps(tree))
    manifest = read_manifest(store)
    assert [shard.number for shard in manifest.shards] == [0, 1, 2] and manifest.num_missing == 1
    scorer = StoreTeacher(path=str(store)).open(tokenizer, ALL)
    with pytest.raises(StoreError, match=r"lacks \d+ of \d+ tokens"):
        scorer.require(samples_of(data, tokenizer))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "sub/shard-00000.parquet", "..", "", "../x.tmp"])
@pytest.mark.parametrize("where", ["shards", "head"])
def test_names_do_not_lead_out_of_the_store(store, tokenizer, name, where):
    """A store from somebody else must not make us read another file, not even one that has the right checksum."""
    (store.parent / "secret.safetensors").write_bytes((store / "shard-00000.parquet").read_bytes())
    tree = json.loads((store / "manifest.json").read_text())
    (tree["shards"][0] if where == "shards" else tree["head"])["name"] = name
    (store / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(StoreError, match=rf"{'shards.0.' if where == 'shards' else 'head.'}name: found .*may lead out of it"):
        StoreTeacher(path=str(store)).open(tokenizer, ALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format: found 'other'"),
        ({"version": 3}, "version: found 3"),
        ({"codec": {"type": "none such"}}, "codec: found type 'none such'"),
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


def test_states_of_no_shape(store):
    tree = json.loads((store / "manifest.json").read_text())
    tree["teacher"]["width"] = None
    (store / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(StoreError, match=r"manifest\.json: .*teacher: found no dtype, width or num_layers"):
        read_manifest(store)


def test_states_of_another_shape(store, data, tokenizer):
    tree = json.loads((store / "manifest.json").read_text())
    tree["teacher"]["width"] = 47
    (store / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(StoreError, match=r"its shards hold something else than its manifest says \(cannot reshape"):
        read_all(store, data, tokenizer)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null"])
def test_a_broken_manifest(store, content):
    (store / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"manifest\.json: not a manifest"):
        StoreTeacher(path=str(store)).provides()


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(StoreError, match=r"found no manifest\.json, expected a folder written by `limbeck capture`"):
        StoreTeacher(path=str(tmp_path)).provides()


def test_a_store_of_the_first_format_says_what_to_do(store):
    (store / "manifest.json").write_text(json.dumps({"format": "limbeck-store", "version": 1, "codec": "exact"}))
    with pytest.raises(StoreError, match=r"found a store of format 1 .*Capture the teacher again into a new folder"):
        StoreTeacher(path=str(store)).provides()
