"""Captures by DistillKit, in both of its codecs: read as they were meant, and made a store that says what is not known."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from captures import ROWS, samples_of
from distillkit_writer import CURRENT, LEGACY, current_row, legacy_row, sample, write

import limbeck
from limbeck.calibration import Signals
from limbeck.cli import main
from limbeck.errors import RecipeError, StoreError
from limbeck.importing import importing_recipe
from limbeck.objectives.base import Needs
from limbeck.store.distillkit import Current, Files, Legacy, Row, read_settings
from limbeck.store.inspect import lines, summary
from limbeck.store.manifest import read_manifest
from limbeck.teachers import DistillKitTeacher, ModelTeacher, StoreTeacher
from limbeck.tokens.pad import pad

FIXTURES = Path(__file__).parent / "fixtures"
STEP = 1 / 16
VARIANTS = [
    {},
    {"delta_encoding": True, "polynomial_terms": [0, 1, "exp"], "k": 8, "residual_bins": []},
    {"normalize_t": True, "term_dtype": "float64", "exact_dtype": "float16"},
    {"polynomial_terms": None, "residual_bins": [{"scale_dtype": "bfloat16", "element_bits": 12, "num_elements": 12}]},
    {"exact_k": 16, "exact_dtype": "float32", "residual_bins": [], "polynomial_terms": None, "d": 131073},
    {"exact_k": 0},
]


@pytest.mark.parametrize("codec", ["current", "legacy"])
def test_the_kept_samples_are_read_as_they_were_written(codec):
    """Ids to the last one, values to what the codec loses. The files lie here, so that reader and writer cannot drift together."""
    folder = FIXTURES / f"distillkit-{codec}"
    settings = read_settings(folder)
    assert isinstance(settings, Current if codec == "current" else Legacy)
    files = Files(folder, settings)
    for (at, ids), (expected, log_probs) in zip(files.documents(), sample(), strict=True):
        assert ids.tolist() == [*expected, 2]
        tokens, values = files.read(at)
        assert len(tokens) == len(expected)
        order = np.argsort(-log_probs, axis=1)[:, :16]
        assert tokens[:-1].tolist() == order.tolist()
        assert np.abs(values[:-1] - np.take_along_axis(log_probs, order, 1)).max() < 0.1
        # what was kept exactly is off by the rounding of its type
        assert np.abs(values[:-1, 1:4] - np.take_along_axis(log_probs, order, 1)[:, 1:4]).max() < 0.02


def test_a_capture_that_was_made_anew_is_another_teacher(tmp_path):
    """In the same folder, under the same name: a run that has begun with the old one does not go on with it."""
    folder = tmp_path / "capture"
    shutil.copytree(FIXTURES / "distillkit-current", folder)
    before = DistillKitTeacher(path=str(folder), tokenizer="its").content()
    assert before == DistillKitTeacher(path=str(FIXTURES / "distillkit-current"), tokenizer="its").content()
    file = next(folder.glob("*.parquet"))
    pq.write_table(pq.read_table(file).slice(1), file)
    assert DistillKitTeacher(path=str(folder), tokenizer="its").content() not in (before, None)


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_setting_of_the_current_codec(changes):
    settings = CURRENT | changes
    values = np.log(0.9 * np.array([0.4 * 0.75**i for i in range(settings["k"])]))
    ids = np.random.default_rng(1).permutation(settings["d"])[: settings["k"]]
    blob, packed = current_row(ids, values, settings)
    parsed = Current(**settings)
    assert parsed.num_bytes() == len(blob)
    tokens, found = parsed.decode({"compressed_logprobs": [blob, blob], "bytepacked_indices": [packed, packed]})
    assert tokens.tolist() == [ids.tolist()] * 2
    assert np.abs(found - values).max() < 0.06


@pytest.mark.parametrize(
    "changes", [{}, {"invert_polynomial": False, "with_sqrt_term": False}, {"exact_k": 16}, {"vocab_size": 2**16, "k": 9}]
)
def test_every_setting_of_the_legacy_codec(changes):
    settings = LEGACY | changes
    values = np.log(0.9 * np.array([0.4 * 0.75**i for i in range(settings["k"])]))
    ids = np.random.default_rng(1).permutation(settings["vocab_size"])[: settings["k"]].tolist()
    words, exact, coefficients = legacy_row(ids, values, settings)
    tokens, found = Legacy(**settings).decode({"packed_indices": [words], "exact_values": [exact], "coeffs": [coefficients]})
    assert tokens.tolist() == [ids]
    assert np.abs(found - values).max() < 0.06


# ---- a store


@pytest.fixture(scope="module")
def samples(data, tokenizer):
    return samples_of(data, tokenizer, 512)


@pytest.fixture(scope="module")
def live(samples, teacher_dir, tokenizer):
    """What the teacher says of every token of every conversation, over its tokens."""
    scorer = ModelTeacher(model=str(teacher_dir)).open(tokenizer, Needs(output=True))
    found = []
    for one in samples:
        whole = type(one)(one.sample_id, one.ids, np.arange(len(one.ids)) > 0)
        found.append((one.ids, torch.log_softmax(3 * scorer.head(scorer.score(pad([whole], 0)).output), -1)))
    return found


@pytest.fixture
def recipe(data, teacher_dir, tmp_path):
    """A recipe that trains, as a file."""
    tree = {
        "student": {"model": str(teacher_dir)},
        "teacher": {"type": "model", "model": str(teacher_dir)},
        "source": {"type": "dataset", "data": str(data), "max_length": 64},
        "objective": [{"type": "ce"}, {"type": "hidden", "pairs": [[0, 0]]}],
        "train": {"steps": 1, "batch_size": 2},
        "capture": {"samples_per_shard": 4, "batch_size": 2},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(tree))
    return file


def captured(live, folder, settings, tokenizer):
    write(folder, live, settings | {("vocab_size" if "vocab_size" in settings else "d"): len(tokenizer)})
    return folder


@pytest.mark.parametrize(("settings", "unknown"), [(CURRENT, ["observed"]), (LEGACY, ["observed"])])
def test_a_store_of_it_says_what_it_said(live, recipe, tokenizer, data, tmp_path, settings, unknown):
    folder = captured(live, tmp_path / "theirs", settings, tokenizer)
    manifest = limbeck.capture(importing_recipe(recipe, folder, out=tmp_path / "store", teacher="somebody/teacher"))
    assert manifest.num_samples == len(ROWS)
    assert (manifest.teacher.name, manifest.teacher.told, list(manifest.teacher.unknown)) == ("somebody/teacher", 16, unknown)
    assert manifest.teacher.weights_sha256 is None and "gradient_angle" not in manifest.certificate
    assert "of targets outside of those the log-probability is a mean" in dict(lines(summary(tmp_path / "store")))["teacher"]
    for one, (_, log_probs) in zip(samples_of(data, tokenizer, 64), live, strict=True):
        batch = pad([one], 0)
        signal = StoreTeacher(path=str(tmp_path / "store")).open(tokenizer, Needs(output=True)).score(batch)
        wanted = log_probs[batch.scored]
        tops = signal.sparse
        assert (tops.log_probs - wanted.gather(-1, tops.ids)).abs().max() < 0.3 + 2 * STEP  # what their codec loses, and ours
        assert (tops.log_probs - wanted.gather(-1, tops.ids)).abs().mean() < STEP
        tail = wanted.scatter(-1, tops.ids, -torch.inf).exp().sum(-1)
        assert (tops.log_tails[1.0].exp() - tail).abs().max() < 0.1
        told = (tops.ids == batch.targets[:, None]).any(1)
        errors = (signal.observed - wanted.gather(-1, batch.targets[:, None])[:, 0])[told].abs()
        assert (errors < 0.3).all()
        assert torch.isfinite(signal.observed).all()


def test_logits_of_the_legacy_codec_have_no_known_tail(live, recipe, tokenizer, tmp_path):
    folder = captured([(ids, values + 9) for ids, values in live], tmp_path / "theirs", LEGACY, tokenizer)
    manifest = limbeck.capture(importing_recipe(recipe, folder, out=tmp_path / "store"))
    assert manifest.teacher.unknown == ("tail", "observed")
    assert "that mass was not told, and counts as 0" in dict(lines(summary(tmp_path / "store")))["teacher"]


def test_a_student_trains_from_it(live, recipe, tokenizer, tmp_path):
    folder = captured(live, tmp_path / "theirs", CURRENT, tokenizer)
    limbeck.capture(importing_recipe(recipe, folder, out=tmp_path / "store"))
    overrides = [f"teacher={{type: store, path: {tmp_path / 'store'}}}", "objective=[{type: logits}]", "capture=null"]
    rows = limbeck.train(recipe, tmp_path / "run", overrides).metrics()
    assert 0 < rows[0]["loss/logits"] < 20 and np.isfinite(rows[0]["teacher_nll"])


def test_the_command_line_imports(live, recipe, tokenizer, tmp_path, capsys, monkeypatch):
    folder = captured(live, tmp_path / "theirs", CURRENT, tokenizer)
    command = ["limbeck", "store", "import", str(recipe), str(folder), "source.limit=3", "--teacher", "them", "--json"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "store")])
    with pytest.raises(SystemExit) as ended:
        main()
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code in (0, None) and found["samples"] == 3
    assert found["codec"] == {"type": "topk", "k": 16, "step": STEP, "temperatures": [1.0], "prior": False}
    assert read_manifest(tmp_path / "store").teacher.name == "them"


def test_row_groups_are_read_one_after_the_other(live, recipe, tokenizer, tmp_path, monkeypatch):
    """Samples are captured by their length elsewhere, and a group that is read again for each of its rows would take for ever."""
    folder = captured(live, tmp_path / "theirs", CURRENT, tokenizer)
    read = Files.read
    groups = []
    monkeypatch.setattr(Files, "read", lambda self, at: groups.append((at.file, at.group)) or read(self, at))
    monkeypatch.setattr(Signals, "all", [])
    limbeck.capture(importing_recipe(recipe, folder, ["capture.batch_size=1"], out=tmp_path / "store"))
    changes = sum(one != other for one, other in pairwise(groups))
    assert len(set(groups)) > 1 and changes == len(set(groups)) - 1


def test_a_section_that_is_none_is_refused(recipe, theirs):
    with pytest.raises(RecipeError, match=r"recipe\.yaml: capture: found 5, expected a mapping"):
        importing_recipe(recipe, theirs, ["capture=5"])


def test_other_data_are_refused_with_the_share_that_is_missing(live, recipe, tokenizer, tmp_path):
    folder = captured(live[:4], tmp_path / "theirs", CURRENT, tokenizer)
    with pytest.raises(StoreError, match=r"the capture lacks \d+ of \d+ tokens .* its documents have other token ids"):
        limbeck.capture(importing_recipe(recipe, folder, out=tmp_path / "store"))


def test_what_a_cut_left_is_found(live, recipe, tokenizer, tmp_path):
    """Cut by us where DistillKit went on: a causal teacher says the same of a beginning."""
    folder = captured(live, tmp_path / "theirs", CURRENT, tokenizer)
    manifest = limbeck.capture(importing_recipe(recipe, folder, ["source.max_length=24"], out=tmp_path / "store"))
    assert 0 < manifest.num_scored < sum(len(ids) for ids, _ in live)


@pytest.fixture
def theirs(tmp_path):
    return Path(shutil.copytree(FIXTURES / "distillkit-current", tmp_path / "theirs"))


def test_settings_may_stand_in_their_recipe_and_must_stand_somewhere(theirs, tmp_path):
    own = read_settings(theirs)
    (theirs / "compression_config.yaml").unlink()
    with pytest.raises(StoreError, match=r"compression_config.yaml: missing; expected the settings .*teacher.logprob_compressor"):
        read_settings(theirs)
    file = tmp_path / "their-recipe.yaml"
    file.write_text(json.dumps({"model": "x", "teacher": {"kind": "dataset", "logprob_compressor": CURRENT}}))
    assert read_settings(theirs, file) == own
    file.write_text(json.dumps({"teacher": {"kind": "dataset", "legacy_logit_compression": LEGACY}}))
    with pytest.raises(StoreError, match=r"found no column 'packed_indices', .* captures in the current codec have others"):
        Files(theirs, read_settings(theirs, file))
    file.write_text(json.dumps(CURRENT | {"exactk": 3}))
    with pytest.raises(RecipeError, match="exactk: unknown key; did you mean 'exact_k'"):
        read_settings(theirs, file)


@pytest.mark.parametrize("change", [{"exact_k": 5}, {"d": 70000}])
def test_other_settings_are_noticed(theirs, change):
    with pytest.raises(StoreError, match=r"values per token, expected .*; the settings are not those with which it was written"):
        Files(theirs, Current(**(CURRENT | change))).read(Row(0, 0, 0))


def test_a_folder_without_a_capture_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"found no \.parquet, expected a capture by DistillKit"):
        Files(tmp_path, Current(**CURRENT))


def test_a_broken_file_is_named(theirs):
    (file,) = theirs.glob("**/*.parquet")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(StoreError, match=rf"{file.name}: cannot be read as Parquet"):
        Files(theirs, Current(**CURRENT))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_many_files_are_not_all_open(theirs):
    (file,) = theirs.glob("**/*.parquet")
    for number in range(9):
        shutil.copy(file, theirs / f"more-{number}.parquet")
    files = Files(theirs, Current(**CURRENT))
    rows = [row for row, _ in files.documents()]
    for row in rows:
        files.read(row)
    opened = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert len({row.file for row in rows}) == 10 and not any(path.is_relative_to(theirs) for path in opened)
