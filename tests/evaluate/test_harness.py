"""lm-evaluation-harness by its adapter, on a local task and tiny models; what needs no harness is tested without it."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from helpers import tiny_model
from limbeck.errors import DataError, RecipeError
from limbeck.evaluate import Harness, Subject
from limbeck.evaluate.harness import _items
from limbeck.evaluate.runner import evaluate

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
ROWS = [
    {"question": "Capital of France?", "choices": ["Paris", "Rome"], "answer": 0},
    {"question": "Capital of Italy?", "choices": ["Oslo", "Rome", "Bonn", "Bern"], "answer": 1},
]


def sample(doc: int = 0, name: str = "none", **metrics):
    about = {"doc_id": doc, "doc_hash": "d" * 64, "prompt_hash": "p" * 64, "filter": name, "arguments": [["q", "a"], ["q", "b"]]}
    return about | metrics | {"metrics": list(metrics)}


def test_items():
    (item,) = _items("t", [sample(acc=1.0, acc_norm=0)], {"acc": True}, {"output_type": "multiple_choice"})
    assert item.id == f"t/0/{'d' * 12}/{'p' * 12}" and item.sums == {"acc": 1.0, "acc_norm": 0.0} and item.counts["acc"] == 1.0
    assert item.detail["num_choices"] == 2
    metrics = Harness(task="t").metrics([item])
    assert metrics["acc"].chance == 0.5 and metrics["acc"].ceiling == 1.0 and metrics["acc"].higher_is_better


def test_mutual_information_asks_for_each_answer_twice():
    (item,) = _items(
        "t", [sample(acc=1.0, acc_mutual_info=0.0) | {"arguments": [["q"], ["q"], [""], [""]]}], {}, {"output_type": "multiple_choice"}
    )
    assert item.detail["num_choices"] == 2
    metrics = Harness(task="t").metrics([item])
    assert metrics["acc"].chance == metrics["acc_mutual_info"].chance == 0.5 and metrics["acc_mutual_info"].ceiling == 1.0


def test_two_ways_of_reading_an_answer_are_one_item():
    samples = [sample(name="strict", exact_match=0.0), sample(name="flexible", exact_match=1.0), sample(1, "strict", exact_match=1.0)]
    items = _items("t", samples, {"exact_match": True}, {"output_type": "generate_until"})
    assert [item.sums for item in items] == [
        {"exact_match/strict": 0.0, "exact_match/flexible": 1.0},
        {"exact_match/strict": 1.0},
    ]
    assert Harness(task="t").metrics(items)["exact_match/strict"].chance is None


def test_lists_of_answers_count_each_and_directions_are_the_tasks():
    (item,) = _items("t", [sample(inst=[True, False, True], wer=0.3)], {"wer": False}, {})
    assert (item.sums["inst"], item.counts["inst"]) == (2.0, 3.0)
    assert not Harness(task="t").metrics([item])["wer"].higher_is_better


def test_a_metric_of_the_whole_corpus_is_none_of_documents():
    with pytest.raises(DataError, match="no metric that is a mean over documents: bleu"):
        _items("t", [sample(bleu=("a", "b"))], {}, {})


def test_what_is_computed_of_all_documents_is_left_out():
    """A mean of log-likelihoods under the name of perplexity would be a wrong number."""
    config = {"metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", "aggregation": "mean"}]}
    (item,) = _items("t", [sample(perplexity=-16.0, acc=1.0)], {}, config)
    assert set(item.sums) == {"acc"}
    with pytest.raises(DataError, match="mean over documents: f1"):
        _items("t", [sample(f1=1.0)], {}, {})


def test_tasks_are_told_apart_and_paths_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert Harness(task="bbh").key == "bbh" and Harness(task="bbh", name="mine").key == "mine"
    assert Harness(task="x", include_path="~/tasks").include_path == "/somewhere/tasks"
    assert Harness(task="a/b c").key == "a-b-c", "its result is a file"


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_package_it_says_what_to_install():
    with pytest.raises(RecipeError, match=r"pip install 'limbeck\[eval\]'"):
        Harness(task="mmlu").check()


@pytest.fixture
def tasks(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "capitals.yaml").write_text(
        f"""task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return tmp_path


@needs_harness
def test_a_group_goes_on_behind_the_tasks_that_are_asked(tasks, tokenizer, monkeypatch):
    """A task at a time, and what an interrupted run has graded is not asked again."""
    yaml = (tasks / "capitals.yaml").read_text()
    for name in ("first", "second", "third"):
        (tasks / f"{name}.yaml").write_text(yaml.replace("task: capitals", f"task: {name}"))
    (tasks / "cities.yaml").write_text("group: cities\ntask: [first, {task: second, num_fewshot: 0}, third]\n")
    benchmark = Harness(task="cities", include_path=str(tasks))
    benchmark.check()
    asked = []
    ask = Harness._ask
    monkeypatch.setattr(Harness, "_ask", lambda self, model, task, *rest: (asked.append(task.task_name), ask(self, model, task, *rest))[1])
    whole = list(benchmark.run(Subject(tiny_model(), tokenizer)))
    assert asked == ["first", "second", "third"] and len(whole) == 6
    done = {item.id: item for item in whole[:3]}
    rest = list(benchmark.run(Subject(tiny_model(), tokenizer, done=done)))
    assert asked[3:] == ["second", "third"] and rest == whole[2:]


@needs_harness
def test_a_task_of_ones_own(tasks, tokenizer):
    benchmark = Harness(task="capitals", include_path=str(tasks), name="capitals")
    benchmark.check()
    (result,) = evaluate([benchmark], Subject(tiny_model(), tokenizer))
    assert [item.id.split("/")[:2] for item in result.items] == [["capitals", "0"], ["capitals", "1"]]
    assert result.metrics["acc"].num_items == 2 and result.metrics["acc"].chance == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert result.cases.startswith("lm-eval ")
    (tasks / "capitals.yaml").write_text((tasks / "capitals.yaml").read_text().replace("Q: ", "Question: "))
    (other,) = evaluate([benchmark], Subject(tiny_model(), tokenizer))
    assert other.cases != result.cases and {i.id for i in other.items}.isdisjoint(i.id for i in result.items), (
        "another prompt pairs with nothing"
    )


@needs_harness
def test_what_is_not_there_is_refused_before_a_model_is_loaded(tasks):
    with pytest.raises(RecipeError, match=r"found 'capitls', expected one of the harness's .*did you mean 'capitals'"):
        Harness(task="capitls", include_path=str(tasks)).check()
    with pytest.raises(RecipeError, match="include_path: found no folder"):
        Harness(task="capitals", include_path=str(tasks / "none")).check()
    with pytest.raises(RecipeError, match="'humaneval': 'humaneval' would run code that a model wrote, which Limbeck never does"):
        Harness(task="humaneval").check()
    with pytest.raises(RecipeError, match=r"'mmlu_[a-z_]+' needs the data set '[a-z]+/mmlu[^']*' of the hub, which is not in its cache"):
        Harness(task="mmlu").check()
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(RecipeError, match=r"'capitals': found no file '.*rows\.jsonl'; paths in a task are seen from the current folder"):
        Harness(task="capitals", include_path=str(tasks)).check()


@needs_harness
def test_cases_are_known_by_files_of_tasks_and_of_data(tasks, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "rows.jsonl"
    elsewhere.write_text((tasks / "rows.jsonl").read_text())
    (tasks / "capitals.yaml").write_text((tasks / "capitals.yaml").read_text().replace(f"{tasks}/rows.jsonl", str(elsewhere)))
    benchmark = Harness(task="capitals", include_path=str(tasks))
    before = benchmark.fingerprint()
    (tasks / "__pycache__").mkdir()
    (tasks / "__pycache__" / "utils.pyc").write_bytes(b"made by running")
    assert benchmark.fingerprint() == before
    elsewhere.write_text(elsewhere.read_text().replace("France", "Spain"))
    assert benchmark.fingerprint() != before
