"""Recipes: what cannot work is refused before anything is loaded, with the key and what to set instead."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from helpers import write_jsonl
from limbeck.check import check
from limbeck.errors import DataError, LimbeckError, ModelError, RecipeError, StoreError
from limbeck.objectives.base import Needs
from limbeck.recipe import LATER, Recipe, check_files, load_recipe, parse_recipe
from limbeck.spec import merge
from limbeck.store import Exact
from limbeck.store.hidden import Float32
from limbeck.store.manifest import Manifest, TeacherIdentity, write_manifest

MODEL = {"num_hidden_layers": 4, "hidden_size": 32}


def write_config(path, **config):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def write_store(path, layers=(), num_layers=6, width=48):
    """The manifest of a capture: all that a recipe looks at."""
    teacher = TeacherIdentity(
        name="t", revision=None, dtype="float32", weights_sha256="0", num_layers=num_layers, width=width, head_scale=1.0, head_soft_cap=None
    )
    kept = {"codec": Exact(), "temperatures": None, "hidden": Float32(), "head": None, "model": None}
    tokens = {"vocabulary": 9, "vocabulary_hash": "0", "template_hash": None, "byte_offsets": True}
    path.mkdir(parents=True)
    write_manifest(path, Manifest(teacher=teacher, layers=layers, packages={}, **kept, **tokens))


@pytest.fixture
def tree(tmp_path, monkeypatch) -> dict[str, Any]:
    """SFT of a model of 4 blocks, with the files that it names; a teacher of 6 blocks is at hand, and stays unused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    write_config(tmp_path / "student", **MODEL)
    write_config(tmp_path / "teacher", num_hidden_layers=6, hidden_size=48)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    write_jsonl(tmp_path / "data.jsonl", [row] * 3)
    return {
        "student": {"model": "student"},
        "source": {"type": "dataset", "data": "data.jsonl"},
        "objective": [{"type": "ce"}],
        "train": {"steps": 3},
    }


TEACHER = {"teacher": {"type": "model", "model": "teacher"}}
AGREEMENT = {"type": "agreement", "data": "data.jsonl"}


def refused(tree, kind: type[LimbeckError] = RecipeError, **changes):
    with pytest.raises(kind) as caught:
        parse_recipe(merge(tree, changes), where="recipe.yaml")
    assert type(caught.value) is kind
    return str(caught.value).removeprefix("recipe.yaml: ")


# ---- what works


def test_the_smallest_recipe(tree):
    recipe = parse_recipe(tree)
    assert (recipe.teacher.type, recipe.seed, recipe.train.optimizer.schedule) == ("none", 0, "cosine")
    student, train = recipe.for_training()
    assert (student.shape(), train.steps, list(recipe.terms)) == ((4, 32), 3, ["ce"])


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_a_learning_rate_as_people_write_it(tree, tmp_path, number):
    """PyYAML takes 1e-4, without a dot, for text."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree).replace("steps: 3", f"steps: 3\n  optimizer: {{learning_rate: {number}}}"))
    assert load_recipe(tmp_path / "recipe.yaml").train.optimizer.learning_rate == 1e-4
    assert load_recipe(tmp_path / "recipe.yaml", ["train.optimizer.learning_rate=2e-5"]).train.optimizer.learning_rate == 2e-5


def test_terms_of_weight_zero_are_dropped_and_need_nothing(tree):
    objective = [{"type": "ce"}, {"type": "logits", "weight": 0}, {"type": "hidden", "weight": 0, "pairs": [[99, 99]]}]
    assert list(parse_recipe(tree | {"objective": objective}).terms) == ["ce"]


def test_terms_of_one_type_are_told_apart(tree):
    objective = [{"type": "logits"}, {"type": "logits", "divergence": "reverse_kl"}]
    recipe = parse_recipe(tree | TEACHER | {"objective": objective})
    assert {key: term.divergence.type for key, term in recipe.terms.items()} == {"logits": "forward_kl", "logits_2": "reverse_kl"}


def test_all_parts_together(tree, tmp_path):
    write_store(tmp_path / "store", layers=(2, 5))
    for teacher in (TEACHER["teacher"], {"type": "store", "path": "store"}):
        objective = [{"type": "ce", "weight": 0.5}, {"type": "logits"}, {"type": "hidden", "pairs": [[1, 2], [3, 5]]}]
        parse_recipe(tree | {"teacher": teacher, "objective": objective, "evaluate": [AGREEMENT, {**AGREEMENT, "name": "again"}]})


def test_models_that_are_not_at_hand_are_checked_when_they_are_loaded(tree):
    """A hub name whose config.json nobody has yet."""
    hub = {"teacher": {"type": "model", "model": "owner-of/teacher"}, "student": {"model": "owner-of/student"}}
    recipe = parse_recipe(merge(tree, hub) | {"objective": [{"type": "hidden", "pairs": [[40, 50]]}]})
    assert recipe.student.shape() is None


def test_a_recipe_parsed_is_a_recipe(tree, tmp_path):
    recipe = parse_recipe(tree)
    assert parse_recipe(recipe) is recipe
    assert parse_recipe(recipe, ["seed=3"]) == parse_recipe(tree, ["seed=3"])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    assert parse_recipe("r.yaml") == parse_recipe(tmp_path / "r.yaml") == recipe
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


def full(tree, tmp_path):
    changes = {
        "student": {"num_layers": 3, "revision": "main"},
        "objective": [{"type": "ce", "weight": 0.25}, {"type": "logits", "temperature": 2}, {"type": "hidden", "pairs": [[0, 1], [2, 5]]}],
        "train": {"optimizer": {"learning_rate": "3e-5", "betas": [0.9, 0.99], "max_grad_norm": None}, "checkpoint_every": 2},
        "source": {"data": ["data.jsonl", "data.jsonl"]},
        "evaluate": [AGREEMENT],
        "capture": {"path": str(tmp_path / "store"), "layers": [1, 5]},
        "seed": 7,
    }
    return merge(tree | TEACHER, changes)


def test_the_resolved_recipe_comes_back_equal(tree, tmp_path):
    recipe = parse_recipe(full(tree, tmp_path))
    resolved = recipe.to_json()
    assert parse_recipe(json.loads(json.dumps(resolved))) == recipe
    assert parse_recipe(resolved).to_json() == resolved


def test_the_resolved_recipe_spells_out_every_default(tree):
    resolved = parse_recipe(tree).to_json()
    later = {key for section, key, _ in LATER if not section}
    assert set(resolved) == set(Recipe.model_fields) - later
    assert resolved["teacher"] == {"type": "none"}
    assert resolved["objective"] == [{"type": "ce", "weight": 1.0}]
    assert resolved["train"]["optimizer"]["warmup_fraction"] == 0.05
    assert resolved["source"]["max_length"] == 1024


# ---- what the objective needs and the teacher gives


@pytest.mark.parametrize(("term", "what"), [({"type": "logits"}, "output"), ({"type": "hidden"}, "hidden states")])
def test_terms_that_need_a_teacher_are_refused_without_one(tree, term, what):
    message = refused(tree, objective=[{"type": "ce"}, term])
    assert message == (
        f"objective: the {term['type']!r} term needs a teacher's {what}, and teacher type 'none' gives none; set teacher to "
        "{type: model, model: NAME} or to a capture {type: store, path: FOLDER} with it, or remove the term"
    )


HELD_OUT = {"type": "bits_per_byte", "name": "heldout", "data": "data.jsonl"}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"best": {"benchmark": "heldout"}}, "train.best: found it without train.evaluate_every, expected the steps between evaluations"),
        ({"evaluate_only": ["heldout"]}, "train.evaluate_only: found it without train.evaluate_every, expected the steps"),
        (
            {"evaluate_every": 2, "evaluate_only": ["held"]},
            "train.evaluate_only: found 'held', expected benchmarks of `evaluate`: heldout",
        ),
        (
            {"evaluate_every": 2, "best": {"benchmark": "heldot"}},
            "train.best.benchmark: found 'heldot', expected one of `evaluate`:",
        ),
        (
            {"evaluate_every": 2, "evaluate_only": ["agreement"], "best": {"benchmark": "heldout"}},
            "train.best.benchmark: found 'heldout', expected one of train.evaluate_only: agreement",
        ),
        (
            {"evaluate_every": 2, "best": {"benchmark": "heldout", "metric": "bits"}},
            "train.best.metric: found 'bits', expected a metric of 'heldout': bits_per_byte",
        ),
        (
            {"evaluate_every": 2, "best": {"benchmark": "agreement", "metric": "teacher_nll"}},
            "train.best.metric: found 'teacher_nll', which is the teacher's and the same for every student",
        ),
    ],
)
def test_evaluations_that_nothing_can_be_chosen_by(tree, train, message):
    assert refused(tree | TEACHER | {"evaluate": [HELD_OUT, AGREEMENT]}, train=train).startswith(message)


def test_evaluations_without_a_benchmark(tree):
    assert refused(tree, train={"evaluate_every": 5}) == (
        "train.evaluate_every: found 5 without a benchmark, expected at least one in `evaluate`"
    )


def test_what_is_asked_during_training(tree):
    tree = tree | TEACHER | {"evaluate": [HELD_OUT, AGREEMENT]}
    assert parse_recipe(tree).during == []
    both = parse_recipe(tree, ["train.evaluate_every=2"])
    assert [benchmark.key for benchmark in both.during] == ["heldout", "agreement"] and both.chosen_by is None
    one = parse_recipe(tree, ["train.evaluate_every=2", "train.evaluate_only=[agreement]", "train.best.benchmark=agreement"])
    assert [benchmark.key for benchmark in one.during] == ["agreement"] and one.chosen_by is one.evaluate[1]


def test_hidden_states_that_a_capture_does_not_hold(tree, tmp_path):
    write_store(tmp_path / "store", layers=())
    store = {"teacher": {"type": "store", "path": "store"}}
    message = refused(tree, **store, objective=[{"type": "hidden"}])
    assert message.startswith("objective: the 'hidden' term needs a teacher's hidden states, and teacher type 'store' gives none; set")
    parse_recipe(tree | store | {"objective": [{"type": "logits"}]})


def test_blocks_that_a_capture_does_not_hold(tree, tmp_path):
    write_store(tmp_path / "store", layers=(1, 5))
    message = refused(tree, teacher={"type": "store", "path": "store"}, objective=[{"type": "hidden", "pairs": [[0, 1], [1, 2], [2, 3]]}])
    assert message == (
        "objective: the 'hidden' term maps teacher blocks [2, 3], the capture holds [1, 5]; capture again with capture.layers, or map those"
    )


def test_a_benchmark_that_compares_with_a_teacher_needs_one(tree):
    message = refused(tree, evaluate=[AGREEMENT])
    assert message == "evaluate: 'agreement' compares with a teacher, and teacher is 'none'; set teacher, or remove it"
    parse_recipe(merge(tree | TEACHER, {"evaluate": [AGREEMENT]}))


@pytest.mark.parametrize("objective", [[{"type": "ce", "weight": 0}], [{"type": "ce", "weight": 0}, {"type": "logits", "weight": 0}]])
def test_weight_zero_everywhere(tree, objective):
    assert refused(tree, objective=objective) == "objective: every weight is 0; expected at least one term with a positive weight"


# ---- layers, from config.json alone


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[4, 0]], "objective.hidden.pairs: found student block 4, expected 0 to 3"),
        ([[0, 6]], "objective.hidden.pairs: found teacher block 6, expected 0 to 5"),
        ([[0, 0], [1, 99]], "objective.hidden.pairs: found teacher block 99, expected 0 to 5"),
    ],
)
def test_blocks_out_of_range(tree, pairs, message):
    assert refused(tree, **TEACHER, objective=[{"type": "hidden", "pairs": pairs}]) == message


def test_blocks_out_of_range_of_a_capture(tree, tmp_path):
    write_store(tmp_path / "store", layers=(1, 5))
    message = refused(tree, teacher={"type": "store", "path": "store"}, objective=[{"type": "hidden", "pairs": [[0, 6]]}])
    assert message == "objective.hidden.pairs: found teacher block 6, expected 0 to 5"


def test_blocks_are_counted_after_pruning(tree):
    objective = [{"type": "hidden", "pairs": [[2, 0]]}]
    parse_recipe(tree | TEACHER | {"objective": objective})
    message = refused(tree, **TEACHER, objective=objective, student={"num_layers": 2})
    assert message == "objective.hidden.pairs: found student block 2, expected 0 to 1"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "found [], expected `uniform`, `cka` or at least one"),
        ([[-1, 0]], "found [(-1, 0)], expected `uniform`, `cka` or at least one [student block, teacher block], counted from 0"),
        ([[0, 1], [0, 1]], "found the same pair twice"),
        ([[0, 1, 2]], "tuple should have at most 2 items"),
        ("unifrom", "found 'unifrom', expected 'uniform' or 'cka' or a valid list; did you mean 'uniform'?"),
        ("all", "found 'all', expected 'uniform' or 'cka' or a valid list"),
    ],
)
def test_pairs_that_are_none(tree, pairs, message):
    found = refused(tree, **TEACHER, objective=[{"type": "hidden", "pairs": pairs}])
    assert found.startswith("objective.0.pairs") and message in found


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"keep_layers": [0, 4]}, "student.keep_layers: found block 4, expected 0 to 3"),
        ({"num_layers": 5}, "student.num_layers: found 5, expected at most 4, the blocks of student"),
        ({"num_layers": 2, "keep_layers": [0, 1]}, "student: found both keep_layers and num_layers, expected one of them"),
        ({"keep_layers": []}, "student: keep_layers: found [], expected block numbers from 0, rising, none twice"),
        ({"keep_layers": [1, 0]}, "student: keep_layers: found [1, 0], expected"),
        ({"keep_layers": [1, 1]}, "student: keep_layers: found [1, 1], expected"),
        ({"keep_layers": [-1, 0]}, "student: keep_layers: found [-1, 0], expected"),
        ({"num_layers": 0}, "student.num_layers: found 0, expected a number greater than 0"),
    ],
)
def test_pruning_that_cannot_be(tree, student, message):
    assert refused(tree, student=student).startswith(message)


def test_uniform_pairs_need_no_more_teacher_blocks_than_there_are(tree):
    for blocks in (1, 2, 4):
        recipe = parse_recipe(merge(tree | TEACHER, {"student": {"num_layers": blocks}, "objective": [{"type": "hidden"}]}))
        pairs = recipe.terms["hidden"].layer_pairs(blocks, 6)
        assert pairs[-1] == (blocks - 1, 5)
        assert all(student < blocks and teacher < 6 for student, teacher in pairs)


# ---- training


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"steps": 3, "epochs": 1}, "train: found both steps and epochs, expected one of them"),
        ({"steps": None}, "train: found neither steps nor epochs, expected one of them"),
        ({"steps": 0}, "train.steps: found 0, expected a number greater than 0"),
        ({"steps": None, "epochs": -1}, "train.epochs: found -1, expected a number greater than 0"),
        ({"steps": True}, "train.steps: found True, expected a number"),
        ({"batch_size": 0}, "train.batch_size: found 0"),
        ({"micro_batch_size": 0}, "train.micro_batch_size: found 0"),
        ({"precision": "float16"}, "train.precision: found 'float16', expected 'float32' or 'bfloat16'; did you mean 'bfloat16'?"),
        ({"head": "fuse"}, "train.head: found 'fuse', expected 'fused' or 'plain'; did you mean 'fused'?"),
        ({"checkpoint_every": 0}, "train.checkpoint_every: found 0"),
        ({"keep_checkpoints": -1}, "train.keep_checkpoints: found -1"),
        ({"optimizer": {"schedule": "cosin"}}, "train.optimizer.schedule: found 'cosin', expected"),
        ({"optimizer": {"betas": [0.9, 1.5]}}, "train.optimizer.betas.1: found 1.5, expected a number less than 1"),
        ({"lr": 1e-4}, "train.lr: unknown key; known keys: steps, epochs"),
    ],
)
def test_training_that_cannot_be(tree, train, message):
    assert refused(tree, train=train).startswith(message)


def test_epochs(tree):
    recipe = parse_recipe(merge(tree, {"train": {"steps": None, "epochs": 0.5}}))
    assert (recipe.train.steps, recipe.train.epochs) == (None, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": [{"type": "logits", "temperature": 0}]},
            "objective.0.temperature: found 0, expected a number greater than or equal to 0.01",
        ),
        (
            {"objective": [{"type": "logits", "temperature": -2}]},
            "objective.0.temperature: found -2, expected a number greater than or equal to 0.01",
        ),
        ({"objective": [{"type": "ce"}, {"type": "logits", "weight": -1}]}, "objective.1.weight: found -1, expected a number greater than"),
        ({"objective": [{"type": "logits", "divergence": "kl"}]}, "objective.0.divergence: found 'kl', expected one of: adaptive_kl"),
        ({"objective": [{"type": "logits", "divergence": "reverse-kl"}]}, "objective.0.divergence: found 'reverse-kl', expected one of:"),
        ({"objective": [{"type": "logits", "divergence": {"type": "jds"}}]}, "objective.0.divergence: found type 'jds', expected one of:"),
        ({"objective": [{"type": "logits", "divergence": {"beta": 0.1}}]}, "objective.0.divergence: found no `type`, expected one of:"),
        ({"objective": [{"type": "logits", "divergence": 2}]}, "objective.0.divergence: found 2, expected a name, or a mapping with a"),
        (
            {"objective": [{"type": "logits", "divergence": {"type": "jsd", "betta": 0.1}}]},
            "objective.0.divergence.betta: unknown key; did you mean 'beta'?",
        ),
        (
            {"objective": [{"type": "logits", "divergence": {"type": "jsd", "beta": 1}}]},
            "objective.0.divergence.beta: found 1, expected a number less than or equal to 0.999",
        ),
        ({"objective": [{"type": "logits", "divergence": {"type": "tvd", "beta": 1}}]}, "objective.0.divergence.beta: unknown key"),
        (
            {"objective": [{"type": "logits", "divergence": {"type": "alpha_beta", "alpha": 0, "beta": 0}}]},
            "objective.0.divergence: found alpha 0 and beta 0, expected together at least 0.01; (1, 0) is forward_kl, (0, 1) is reverse_kl",
        ),
        ({"objective": [{"type": "logits", "trust_threshold": 1}]}, "objective.0.trust_threshold: found 1, expected a number less than 1"),
        ({"objective": [{"type": "ranking", "margin": 0.1}]}, "objective.0: found margin 0.1 beside measure 'logistic', expected it with"),
        ({"objective": [{"type": "ranking", "top_k": 65}]}, "objective.0.top_k: found 65, expected a number less than or equal to 64"),
        (
            {"objective": [{"type": "logit"}]},
            "objective.0: found type 'logit', expected one of: ce, hidden, hidden_as_published, logits, mse_logits, ranking; did you mean",
        ),
        ({"objective": [{"type": "logits", "temprature": 2}]}, "objective.0.temprature: unknown key; did you mean 'temperature'?"),
        ({"objective": {"type": "ce"}}, "objective: found {'type': 'ce'}, expected a valid list"),
        (
            {"teacher": {"type": "modle", "model": "x"}},
            "teacher: found type 'modle', expected one of: distillkit, model, none, server, store; did you mean",
        ),
        ({"source": {"type": "datasets"}}, "source: found type 'datasets', expected one of: dataset; did you mean 'dataset'?"),
        ({"source": {"data": []}}, "source.data: found nothing"),
        ({"source": {"data": 5}}, "source.data: found 5, expected a file or the name of a data set, a mapping, or a list of these"),
        ({"source": {"max_length": 1}}, "source.max_length: found 1, expected a number greater than 1"),
        ({"source": {"limit": 0}}, "source.limit: found 0, expected a number greater than 0"),
        ({"seed": -1}, "seed: found -1, expected a number greater than or equal to 0"),
        ({"seed": 2**63}, f"seed: found {2**63}, expected a number less than {2**63}"),
        ({"capture": {"path": "x", "layers": [-1]}}, "capture.layers.0: found -1, expected a number greater than or equal to 0"),
        ({"capture": {}}, "capture.path: missing; expected a value"),
        ({"evaluate": [{"type": "bits_per_bite", "data": "x"}]}, "evaluate.0: found type 'bits_per_bite', expected one of: agreement"),
        ({"trian": {"steps": 3}}, "trian: unknown key; did you mean 'train'?"),
    ],
)
def test_values_that_cannot_be(tree, changes, message):
    assert refused(tree | TEACHER, **changes).startswith(message)


# ---- names of benchmarks


def test_two_benchmarks_of_one_name(tree):
    twice = [{"type": "bits_per_byte", "data": "data.jsonl"}, {"type": "bits_per_byte", "data": "other.jsonl"}]
    assert refused(tree, evaluate=twice) == "evaluate: found 'bits_per_byte' twice; give one of them another `name`"
    twice[1]["name"] = "other"
    assert [benchmark.key for benchmark in parse_recipe(tree | {"evaluate": twice}).evaluate] == ["bits_per_byte", "other"]
    twice[0]["name"] = "other"
    assert "found 'other' twice" in refused(tree, evaluate=twice)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/b", "..", ".hidden"])
def test_the_name_of_a_benchmark_is_a_file_name(tree, name):
    """It becomes evals/NAME.json in the run."""
    message = refused(tree, evaluate=[{"type": "bits_per_byte", "data": "data.jsonl", "name": name}])
    assert message.startswith("evaluate") and repr(name) in message


# ---- what a command needs


@pytest.mark.parametrize("key", ["student", "train", "objective"])
def test_what_training_needs(tree, key):
    del tree[key]
    with pytest.raises(RecipeError, match=f"^{key}: missing; expected it in a recipe that trains$"):
        parse_recipe(tree).for_training()


def test_what_capturing_needs(tree, tmp_path):
    with pytest.raises(RecipeError, match=r"^capture: missing; expected a section with the `path` of the store to write$"):
        parse_recipe(tree | TEACHER).for_capture()
    section = {"capture": {"path": "new"}}
    write_store(tmp_path / "store")
    for teacher in ({"type": "none"}, {"type": "store", "path": "store"}):
        with pytest.raises(
            RecipeError, match=f"^teacher.type: found {teacher['type']!r}, expected one of 'distillkit', 'model', 'server': only a teacher"
        ):
            parse_recipe(tree | section | {"teacher": teacher}).for_capture()
    with pytest.raises(RecipeError, match=r"^capture\.layers: found 6, expected 0 to 5, the teacher's blocks$"):
        parse_recipe(tree | TEACHER | {"capture": {"path": "new", "layers": [0, 6, 7]}}).for_capture()


def test_what_is_captured(tree):
    """The layers that the objective maps, or those that are asked for; always the output."""
    section = {"capture": {"path": "new"}, "objective": [{"type": "ce"}, {"type": "hidden", "pairs": [[0, 1], [3, 5]]}]}
    assert parse_recipe(tree | TEACHER | section).for_capture()[1] == Needs(output=True, layers=frozenset({1, 5}))
    section["capture"]["layers"] = [2]
    assert parse_recipe(tree | TEACHER | section).for_capture()[1] == Needs(output=True, layers=frozenset({2}))
    section["capture"]["layers"] = []
    assert parse_recipe(tree | TEACHER | section).for_capture()[1] == Needs(output=True)
    alone = {"source": tree["source"], "capture": {"path": "new"}, **TEACHER}
    assert parse_recipe(alone).for_capture()[1] == Needs(output=True)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_capture_does_not_write_over_something_else(tree, tmp_path, kind):
    if kind == "file":
        (tmp_path / "new").write_text("")
    else:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "thesis.txt").write_text("")
    with pytest.raises(StoreError, match=r"store 'new': found .*, expected a new folder or one written by `limbeck capture`"):
        parse_recipe(tree | TEACHER | {"capture": {"path": "new"}}).for_capture()


# ---- files that a recipe names


def test_missing_files_are_all_named(tree):
    changes = {
        "student": {"model": "studnet"},
        "source": {"data": ["data.jsonl", "dtaa.jsonl"]},
        "evaluate": [{"type": "bits_per_byte", "data": "held.jsonl"}],
    }
    tree["student"] = {"model": "owner/fine"}
    assert check_files(parse_recipe(tree)) == []
    problems = check_files(parse_recipe(merge(tree, {**changes, "student": {"model": "owner/fine"}})))
    assert [problem.split(":")[0] for problem in problems] == ["data 'dtaa.jsonl'", "data 'held.jsonl'"]
    assert "did you mean 'data.jsonl'?" in problems[0]


def test_a_model_that_is_not_there(tree):
    assert refused(tree, ModelError, student={"model": "./studnet"}, **TEACHER).startswith("model './studnet': no such folder")
    assert "; did you mean 'teacher'?" in refused(tree, ModelError, teacher={"type": "model", "model": "./teachr"})


def test_a_capture_that_is_not_there(tree):
    message = refused(tree, StoreError, teacher={"type": "store", "path": "nowhere"})
    assert message == "store 'nowhere': found no manifest.json, expected a folder written by `limbeck capture`"


def test_a_broken_config(tree, tmp_path):
    (tmp_path / "student" / "config.json").write_text("{")
    assert refused(tree, ModelError).startswith("student/config.json: not readable as JSON")
    (tmp_path / "student" / "config.json").write_text('{"num_hidden_layers": "4", "hidden_size": 32}')
    assert refused(tree, ModelError) == "student/config.json: num_hidden_layers: found '4', expected a number from 1"


def test_check_says_what_a_recipe_will_do(tree, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(full(tree, tmp_path)))
    found = check("recipe.yaml", ["source.limit=5"])
    assert found["kind"] == "recipe"
    assert found["student_shape"] == {"num_layers": 3, "width": 32}
    assert found["teacher"] == {"type": "model", "num_layers": 6, "width": 48}
    assert found["layer_pairs"] == {"hidden": [[0, 1], [2, 5]]}
    assert found["num_conversations"] == 5
    assert found["benchmarks"] == ["agreement"]
    json.dumps(found)


def test_check_reads_the_data(tree, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(DataError, match=r"data\.jsonl:1: messages: found an empty list"):
        check("recipe.yaml")


# ---- the schema


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "") -> list[str]:
    """What breaks a JSON schema: as much of the standard as ours uses."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    for key, fits in (("oneOf", lambda n: n == 1), ("anyOf", lambda n: n >= 1)):
        if key in schema and not fits(sum(not violations(value, option, root) for option in schema[key])):
            return [f"{at}: not {key}"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    if "type" in schema and (not isinstance(value, kinds[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean")):
        return [f"{at}: not {schema['type']}"]
    found = []
    if "const" in schema and value != schema["const"]:
        found.append(f"{at}: not const")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at}: not enum")
    if "exclusiveMinimum" in schema and not value > schema["exclusiveMinimum"]:
        found.append(f"{at}: not exclusiveMinimum")
    if schema.keys() & {"minimum", "maximum"} and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        found.append(f"{at}: out of bounds")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [f"{at}.{key}: required" for key in schema.get("required", ()) if key not in value]
        for key, item in value.items():
            if key in known:
                found += violations(item, known[key], root, f"{at}.{key}")
            elif schema.get("additionalProperties") is False:
                found.append(f"{at}.{key}: unknown")
    if isinstance(value, list):
        for index, item in enumerate(value):
            inner = schema["prefixItems"][index] if index < len(schema.get("prefixItems", ())) else schema.get("items", {})
            found += violations(item, inner, root, f"{at}.{index}")
    return found


def test_the_schema_accepts_real_recipes(tree, tmp_path):
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert violations(tree, schema, schema) == []
    assert violations(parse_recipe(full(tree, tmp_path)).to_json(), schema, schema) == []


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"trian": {}}, ".trian"),
        ({"train": {"stesp": 3}}, ".train"),
        ({"objective": [{"type": "logit"}]}, ".objective.0"),
        ({"objective": [{"type": "logits", "temprature": 1}]}, ".objective.0"),
        ({"objective": [{"type": "logits", "temperature": 0}]}, ".objective.0"),
        ({"teacher": {"type": "model"}}, ".teacher"),
        ({"seed": "one"}, ".seed"),
        ({"source": None}, ".source"),
    ],
)
def test_the_schema_refuses_what_the_recipe_refuses(tree, changes, where):
    schema = Recipe.model_json_schema()
    found = violations(merge(tree, changes), schema, schema)
    assert found and all(each.startswith(where) for each in found)


def test_the_schema_knows_every_member_and_documents_its_fields():
    definitions = Recipe.model_json_schema()["$defs"]
    assert {"CrossEntropy", "Logits", "Hidden", "NoTeacher", "ModelTeacher", "StoreTeacher", "DatasetSource", "Agreement"} <= set(
        definitions
    )
    undocumented = [
        f"{name}.{key}"
        for name, definition in definitions.items()
        for key, field in definition["properties"].items()
        if "description" not in field and key not in ("type", "optimizer")
    ]
    assert not undocumented


# ---- torch-free


def test_recipes_are_checked_without_torch(tree, tmp_path):
    """All of it: layers from config.json, a capture, benchmarks, data, the schema, and the error of a bad recipe."""
    write_store(tmp_path / "store", layers=(1, 5))
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(full(tree, tmp_path) | {"capture": {"path": "new"}}))
    program = """
import sys
from limbeck.check import check
from limbeck.errors import RecipeError
from limbeck.recipe import Recipe, load_recipe
for teacher in ("{type: model, model: teacher}", "{type: store, path: store}"):
    found = check("model.yaml", [f"teacher={teacher}"])
    assert found["teacher"]["num_layers"] == 6, found
load_recipe("model.yaml").for_capture()
load_recipe("model.yaml").for_training()
Recipe.model_json_schema()
try:
    check("model.yaml", ["objective.2.pairs=[[0, 9]]"])
except RecipeError as error:
    print(error)
print([name for name in ("torch", "transformers", "safetensors") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["model.yaml: objective.hidden.pairs: found teacher block 9, expected 0 to 5", "[]"], done.stderr


def test_a_study_is_not_taken_for_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("name: s\nbase: {}\narms: {a: {}}\n")
    with pytest.raises(RecipeError, match="found a study, expected a recipe; `limbeck study"):
        load_recipe(file)
