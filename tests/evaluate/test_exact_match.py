"""Exact match: questions by seed, answers by a rigged model, extraction and comparison."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from helpers import tiny_model
from limbeck.errors import LimbeckError, RecipeError
from limbeck.evaluate import ExactMatch, Subject
from limbeck.evaluate.exact_match import extract, is_same
from limbeck.spec import validate

pytest.importorskip("reasoning_gym")

EASY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def benchmark(**fields):
    return ExactMatch(**({"task": "products", "settings": EASY, "limit": 8, "max_new_tokens": 6} | fields))


def answering(text, tokenizer, bigram_model):
    """A model that answers everything with `text`, whose tokens must all differ."""
    ids = [tokenizer("<|im_start|>assistant\n")["input_ids"][-1], *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(set(ids)) == len(ids)
    table = torch.zeros(len(tokenizer), len(tokenizer))
    for before, after in itertools.pairwise(ids):
        table[before, after] = 20.0
    return bigram_model(table)


def run(bench, model, tokenizer):
    with torch.no_grad():
        items = bench.run(Subject(model, tokenizer))
        return sorted(items, key=lambda item: int(item.id.rpartition("-")[2]))


def test_right_and_wrong_answers(tokenizer, bigram_model):
    bench = benchmark(limit=40, extract="number")
    items = run(bench, answering("It is 8.", tokenizer, bigram_model), tokenizer)
    expected = [entry["answer"] for entry in bench.entries().values()]
    assert 0 < expected.count("8") < 40
    assert [item.sums["accuracy"] for item in items] == [float(answer == "8") for answer in expected]
    assert all(item.sums["answered"] == 1.0 for item in items)
    assert {item.detail["extracted"] for item in items} == {"8"} and {item.detail["text"] for item in items} == {"It is 8."}
    assert [item.detail["expected"] for item in items] == expected
    metrics = bench.metrics(items)
    assert metrics["accuracy"].value == pytest.approx(expected.count("8") / 40)
    assert metrics["accuracy"].chance is None


def test_an_answer_cut_by_the_budget_is_not_answered(tokenizer, bigram_model):
    model = answering("It is 8.", tokenizer, bigram_model)
    long = len(tokenizer("It is 8.")["input_ids"])
    assert {item.sums["answered"] for item in run(benchmark(max_new_tokens=long), model, tokenizer)} == {0.0}
    assert {item.sums["answered"] for item in run(benchmark(max_new_tokens=long + 1), model, tokenizer)} == {1.0}


def test_an_empty_answer_is_not_answered(tokenizer, bigram_model):
    items = run(benchmark(), answering("", tokenizer, bigram_model), tokenizer)
    assert {(item.sums["answered"], item.sums["accuracy"], item.detail["extracted"]) for item in items} == {(0.0, 0.0, "")}


def test_items_do_not_depend_on_limit_and_batch(tokenizer):
    model = tiny_model()
    many = {item.id: item for item in run(benchmark(limit=8, batch_size=8), model, tokenizer)}
    few = {item.id: item for item in run(benchmark(limit=3, batch_size=1), model, tokenizer)}
    assert len(many) == 8 and few.items() <= many.items()
    assert all(key.startswith("products-0-") for key in many)


def test_questions_are_distinct_and_fixed_by_the_seed():
    first, again, other = (benchmark(limit=60, seed=seed).entries() for seed in (1, 1, 50_000))
    assert first == again
    questions = [entry["question"] for entry in first.values()]
    assert len(set(questions)) == 60 and questions != [entry["question"] for entry in other.values()]
    assert list(first) == sorted(first) and list(first) != list(range(60))


def test_the_pool_does_not_depend_on_the_limit():
    """In some tasks the size of the data set changes the questions."""
    assert benchmark(limit=3)._dataset().size == benchmark(limit=5)._dataset().size


def test_suffix_and_style_reach_the_prompt(tokenizer, monkeypatch):
    import limbeck.generate

    seen = []

    def remember(model, prompts, *args, **kwargs):
        seen.append(tokenizer.decode(prompts[0]))
        return [{index: [2] for index in range(len(prompts))}]

    monkeypatch.setattr(limbeck.generate, "answer_batches", remember)
    run(benchmark(suffix=" Only the number."), tiny_model(), tokenizer)
    run(benchmark(prompt="plain"), tiny_model(), tokenizer)
    assert seen[0].endswith(" Only the number.<|im_end|>\n<|im_start|>assistant\n")
    assert seen[1].startswith("Question: ") and seen[1].endswith("\nAnswer:")


@pytest.mark.parametrize(
    ("text", "line", "number"),
    [
        ("42", "42", "42"),
        (" 42.\n", "42", "42"),
        ("7 * 2 = 14\n\nThe answer is **-1,400.50**.", "The answer is **-1,400.50", "-1,400.50"),
        ("**14**", "14", "14"),
        ('"Paris".', "Paris", ""),
        ("12-5 = 7-3", "12-5 = 7-3", "3"),
        ("it is −4!", "it is −4", "-4"),
        ("one, 2, 3,", "one, 2, 3", "3"),
        ("about .5", "about .5", ".5"),
        ("\n \n", "", ""),
        ("...", "", ""),
        ("version 2.5.1", "version 2.5.1", "2.5"),
        ("x2", "x2", ""),
    ],
)
def test_extraction(text, line, number):
    assert extract(text, "line") == line
    assert extract(text, "number") == number


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("14", "14", True),
        ("14.0", "14", True),
        ("1,400", "1400", True),
        ("+14", "14", True),
        ("-14", "14", False),
        ("Yes", "yes.", True),
        ("the  fox", "The fox", True),
        ("the fox", "the dog", False),
        ("", "14", False),
        ("140", "14", False),
        ("nan", "14", False),
    ],
)
def test_comparison(found, expected, same):
    assert is_same(found, expected) is same


def test_what_a_model_writes_is_never_run(tokenizer, tmp_path):
    """reasoning-gym's own grader evaluates answers to this task as Python."""
    marker = tmp_path / "ran"
    bench = benchmark(task="spiral_matrix", settings={}, limit=1)
    item = bench._grade(0, next(iter(bench.entries().values())), f"[open({str(marker)!r}, 'w')]", ended=True)
    assert item.sums["accuracy"] == 0.0 and not marker.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "product"}, "evaluate: 'exact_match': task 'product' is none of reasoning-gym's; did you mean 'products'"),
        ({"task": "qqqqqqqq"}, "known tasks: .*chain_sum"),
        ({"settings": {"max_digit": 1}}, "settings.max_digit: unknown setting of task 'products'; did you mean 'max_digits'"),
        ({"settings": {"min_terms": 0}}, "task 'products' refuses the settings .*min_terms must be positive"),
        ({"settings": {"min_digits": "x"}}, "task 'products' refuses the settings"),
        ({"limit": 101}, "gives 100 different questions in 2000 with these settings, limit is 101"),
        ({"task": "propositional_logic", "settings": {}, "name": "q"}, "evaluate: 'q': .* has the answer None, which extract 'line'"),
        ({"task": "n_queens", "settings": {}}, "has the answer '_ _ .*, which extract 'line' never gives"),
        ({"task": "caesar_cipher", "settings": {}, "extract": "number"}, "has the answer '[A-Z ]*'?, which extract 'number' never gives"),
    ],
)
def test_bad_tasks(fields, message):
    with pytest.raises(RecipeError, match=message):
        benchmark(**fields).check()


def test_settings_that_are_fields_of_the_benchmark():
    with pytest.raises(RecipeError, match=r"settings: .*'size' is no setting of a task here; expected it as `limit`"):
        validate(ExactMatch, {"task": "products", "settings": {"size": 3}}, "recipe")


def test_without_reasoning_gym(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(LimbeckError, match=r"needs the package reasoning-gym; install it with: pip install 'limbeck\[demo\]'"):
        benchmark().check()


def test_fingerprint_names_the_generator():
    assert benchmark().fingerprint().startswith("reasoning-gym 0.")
