"""The runner: modes, timing, what is taken from a folder of results and what is not."""

from __future__ import annotations

import json
from typing import ClassVar, Literal

import pytest
import torch

from helpers import tiny_model
from limbeck.errors import DataError, RecipeError, RunError
from limbeck.evaluate import Agreement, Benchmark, BitsPerByte, Item, MultipleChoice, Result, Subject, evaluate, evaluate_model
from limbeck.run import Run, write_json
from limbeck.teachers import ModelTeacher, NoTeacher

ROWS = [{"prompt": "What is the weather?", "completion": text} for text in ("It is sunny.", "five", "The dog sleeps on.")]


@pytest.fixture
def probe():
    """A benchmark that counts its runs; it leaves the family when the test ends."""

    class Probe(Benchmark):
        type: Literal["probe"] = "probe"
        value: float = 1.0
        ids: tuple[str, ...] = ("a", "b")
        version: ClassVar[int] = 1
        higher_is_better: ClassVar[dict[str, bool]] = {"m": True}
        runs: ClassVar[list[tuple[bool, bool]]] = []

        def run(self, subject):
            self.runs.append((subject.model.training, torch.is_grad_enabled()))
            return [Item(name, {"m": self.value}, {"m": 1.0}) for name in self.ids]

    yield Probe
    del Benchmark.members["probe"]


def subject(tokenizer, seed=0, **more):
    return Subject(tiny_model(seed=seed), tokenizer, **more)


def test_eval_mode_without_gradients_and_back(probe, tokenizer):
    one = subject(tokenizer)
    one.model.train()
    for result in evaluate([probe()], one):
        assert torch.is_grad_enabled() and one.model.training
        assert result.metrics["m"].value == 1.0 and result.seconds >= 0
    assert probe.runs == [(False, False)]


def test_mode_is_restored_after_an_error(probe, tokenizer):
    one = subject(tokenizer)
    one.model.train()
    with pytest.raises(RunError):
        list(evaluate([_nan(probe)], one))
    assert one.model.training


def _nan(probe):
    return probe.model_construct(type="probe", name="bad", value=float("nan"), ids=("a",))


def test_settings_are_the_whole_spec_and_json(probe, tokenizer):
    (result,) = evaluate([probe(name="mine")], subject(tokenizer))
    assert result.settings == {"type": "probe", "name": "mine", "value": 1.0, "ids": ["a", "b"]}
    assert (result.name, result.version) == ("mine", 1)
    assert set(result.subject) == {"weights_sha256", "vocabulary_sha256", "template_sha256"}


def keep(results, folder):
    for result in results:
        write_json(folder / f"{result.name}.json", result.to_json())


def test_finished_benchmarks_are_not_run_again(probe, tokenizer, tmp_path):
    first = list(evaluate([probe(name="x"), probe(name="y")], subject(tokenizer), tmp_path))
    keep(first[:1], tmp_path)
    again = list(evaluate([probe(name="x"), probe(name="y")], subject(tokenizer), tmp_path))
    assert len(probe.runs) == 3
    assert again[0] == first[0]


def test_results_come_one_by_one(probe, tokenizer):
    """So that each can be written before the next is begun."""
    results = evaluate([probe(name="x"), probe(name="y")], subject(tokenizer))
    next(results)
    assert len(probe.runs) == 1


CHANGES = {
    "settings": lambda tree: tree["settings"].update(value=2.0),
    "version": lambda tree: tree.update(version=0),
    "cases": lambda tree: tree.update(cases="other data"),
    "weights": lambda tree: tree["subject"].update(weights_sha256="0"),
    "no result": lambda tree: tree.pop("items"),
    "unknown field": lambda tree: tree.update(color="red"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_result_of_anything_else_is_not_taken(probe, tokenizer, tmp_path, change):
    keep(evaluate([probe()], subject(tokenizer), tmp_path), tmp_path)
    tree = json.loads((tmp_path / "probe.json").read_text())
    change(tree)
    write_json(tmp_path / "probe.json", tree)
    list(evaluate([probe()], subject(tokenizer), tmp_path))
    assert len(probe.runs) == 2


def test_damaged_file_and_other_weights_are_not_taken(probe, tokenizer, tmp_path):
    keep(evaluate([probe()], subject(tokenizer), tmp_path), tmp_path)
    list(evaluate([probe()], subject(tokenizer, seed=1), tmp_path))
    (tmp_path / "probe.json").write_text('{"name": ')
    list(evaluate([probe()], subject(tokenizer), tmp_path))
    assert len(probe.runs) == 3


def test_changed_data_is_graded_anew(tokenizer, write_jsonl, tmp_path):
    benchmark = BitsPerByte(data=str(write_jsonl(ROWS)))
    folder = tmp_path / "evals"
    keep(evaluate([benchmark], subject(tokenizer), folder), folder)
    write_jsonl(ROWS[:2])
    (again,) = evaluate([benchmark], subject(tokenizer), folder)
    assert len(again.items) == 2


def test_the_teacher_belongs_to_the_result(tokenizer, write_jsonl, make_model_dir, tmp_path):
    benchmarks = [Agreement(data=str(write_jsonl(ROWS))), BitsPerByte(data=str(write_jsonl(ROWS)))]
    one, other = (ModelTeacher(model=str(make_model_dir(seed=seed))) for seed in (1, 2))
    first = list(evaluate(benchmarks, subject(tokenizer, teacher=one)))
    keep(first, tmp_path)
    second = list(evaluate(benchmarks, subject(tokenizer, teacher=other), tmp_path))
    assert first[0].metrics["kl"].value != second[0].metrics["kl"].value
    assert first[1] == second[1]


def test_no_benchmarks(tokenizer):
    assert list(evaluate([], subject(tokenizer))) == []


@pytest.mark.parametrize("teacher", [None, NoTeacher()])
def test_a_teacher_that_is_missing(tokenizer, teacher, write_jsonl):
    with pytest.raises(RecipeError, match="evaluate: 'agreement' compares with a teacher, and there is none"):
        list(evaluate([Agreement(data=str(write_jsonl(ROWS)))], subject(tokenizer, teacher=teacher)))


def test_bad_items(probe, tokenizer):
    for bad, error, message in (
        (probe(ids=()), DataError, "'probe' has no case"),
        (probe(ids=("a", "b", "a")), DataError, "'probe' has item 'a' twice"),
        (_nan(probe), RunError, "'bad': m of item 'a' is nan; the model's outputs are not finite"),
    ):
        with pytest.raises(error, match=message):
            list(evaluate([bad], subject(tokenizer)))


def test_a_model_by_folder(model_dir, write_jsonl, tmp_path, capsys):
    choices = write_jsonl([{"id": i, "question": "Who?", "choices": ["the dog", "five"], "answer": 0} for i in range(3)], "mc.jsonl")
    benchmarks = [
        BitsPerByte(data=str(write_jsonl(ROWS)), name="bits"),
        MultipleChoice(data=str(choices)),
        Agreement(data=[str(write_jsonl(ROWS))]),
    ]
    teacher = ModelTeacher(model=str(model_dir))
    results = evaluate_model(str(model_dir), benchmarks, teacher, tmp_path / "out")
    assert [result.name for result in results] == ["bits", "multiple_choice", "agreement"]
    assert results[2].metrics["kl"].value == 0.0
    evals = Run(tmp_path / "out").evals()
    assert {name: Result.from_json(tree) for name, tree in evals.items()} == {result.name: result for result in results}
    assert "bits: bits_per_byte" in capsys.readouterr().err
    before = [file.stat().st_mtime_ns for file in (tmp_path / "out" / "evals").iterdir()]
    assert evaluate_model(str(model_dir), benchmarks, teacher, tmp_path / "out") == results
    assert len(before) == 3


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_folder_that_was_changed_is_graded_anew(make_model_dir, write_jsonl, tmp_path, file):
    """The weights and the vocabulary are those that they were; what comes of them is not."""
    benchmarks = [BitsPerByte(data=str(write_jsonl(ROWS)))]
    folder = make_model_dir()
    (first,) = evaluate_model(str(folder), benchmarks, out=tmp_path / "out")
    tree = json.loads((folder / file).read_text())
    if file == "config.json":
        tree["rms_norm_eps"] = 0.5
    else:
        tree["model"]["merges"] = tree["model"]["merges"][:20]
    (folder / file).write_text(json.dumps(tree))
    (second,) = evaluate_model(str(folder), benchmarks, out=tmp_path / "out")
    assert first.metrics != second.metrics


def test_a_run_keeps_no_results_of_another_model(model_dir, write_jsonl, tmp_path):
    """Its report and its card would show them as those of its student."""
    write_json(tmp_path / "run" / "run.json", {"status": "finished", "weights_sha256": "0" * 64})
    with pytest.raises(RunError, match=r"run: holds a run, whose student is another model than .*; choose another folder with --out"):
        evaluate_model(str(model_dir), [BitsPerByte(data=str(write_jsonl(ROWS)))], out=tmp_path / "run")
    assert not (tmp_path / "run" / "evals").exists()


def test_bad_calls_of_evaluate_model_come_before_the_model_is_loaded(write_jsonl, tmp_path):
    good = BitsPerByte(data=str(write_jsonl(ROWS)))
    with pytest.raises(RecipeError, match="evaluate: found 'bits_per_byte' twice"):
        evaluate_model("none/none", [good, good])
    with pytest.raises(DataError, match="no such file"):
        evaluate_model("none/none", [BitsPerByte(data=str(tmp_path / "none.jsonl"))])
