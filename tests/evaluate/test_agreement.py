"""Agreement against its definition: full logits, in float64, one conversation after the other."""

from __future__ import annotations

import math
import random
import statistics
from itertools import pairwise

import pytest
import torch

from helpers import tiny_model
from limbeck.batch import Signal, TopK
from limbeck.errors import DataError, StoreError
from limbeck.evaluate import Agreement, Item, Subject
from limbeck.evaluate import agreement as module
from limbeck.evaluate.agreement import NUM_BINS, _compare, calibration_error
from limbeck.objectives.head import Head
from limbeck.teachers import ModelTeacher

WORDS = ["the", "quick", "brown", "fox", "weather", "Paris", "sunny", "add", "two", "three", "five", "answer", "student", "teacher", "dog"]


def rows(count=9, seed=0):
    draw = random.Random(seed)
    text = lambda low, high: " ".join(draw.choices(WORDS, k=draw.randint(low, high)))  # noqa: E731
    return [{"messages": [{"role": "user", "content": text(1, 6)}, {"role": "assistant", "content": text(1, 12)}]} for _ in range(count)]


@pytest.fixture(scope="module")
def teacher_dir(make_model_dir):
    return make_model_dir(seed=1, tied=False)


@pytest.fixture(scope="module")
def student():
    return tiny_model(layers=2, seed=2)


def knowing(tokenizer, bigram_model, random_table):
    """A student that knows some tokens of the data well and some for sure, so that calibration has something to measure."""
    table = random_table.clone()
    for row in rows():
        for before, after in pairwise(tokenizer(row["messages"][1]["content"] + "<|im_end|>")["input_ids"]):
            table[before, after] += (0.0, 6.0, 60.0)[after % 3]
    return bigram_model(table)


def grade(benchmark, model, tokenizer, teacher_dir):
    with torch.no_grad():
        return list(benchmark.run(Subject(model, tokenizer, "cpu", ModelTeacher(model=str(teacher_dir)))))


def reference(sample, student, teacher, num_tokens):
    """Per scored token: kl, agree, nll, teacher nll, confidence, correct."""
    ids = torch.tensor(sample.ids)[None]
    with torch.no_grad():
        q, p = (model(ids).logits[0, :, :num_tokens].double().log_softmax(-1) for model in (student, teacher))
    found = []
    for t in range(len(sample.ids) - 1):
        if sample.is_target[t + 1]:
            target = int(sample.ids[t + 1])
            kl = float((p[t].exp() * (p[t] - q[t])).sum())
            best = int(q[t].argmax())
            found.append(
                (
                    kl,
                    best == int(p[t].argmax()),
                    -float(q[t, target]),
                    -float(p[t, target]),
                    float(q[t, best].exp()),
                    float(best == target),
                )
            )
    return found


def test_values_by_definition(write_jsonl, tokenizer, teacher_dir, bigram_model, random_table, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(module, "ROWS_PER_CHUNK", 7)
    student = knowing(tokenizer, bigram_model, random_table)
    benchmark = Agreement(data=str(write_jsonl(rows())), batch_size=4)
    items = grade(benchmark, student, tokenizer, teacher_dir)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    samples = benchmark.samples(tokenizer)
    everything = []
    assert len(items) == len(samples) == 9
    for sample in samples:
        tokens = reference(sample, student, teacher, len(tokenizer))
        everything += tokens
        item = next(item for item in items if item.id == f"{sample.sample_id % 2**64:016x}")
        assert item.counts == dict.fromkeys(("kl", "top1", "nll", "teacher_nll"), len(tokens))
        for index, name in enumerate(("kl", "top1", "nll", "teacher_nll")):
            assert item.sums[name] == pytest.approx(sum(token[index] for token in tokens), rel=1e-4, abs=1e-5)
    metrics = benchmark.metrics(items)
    assert list(metrics) == list(Agreement.higher_is_better)
    assert metrics["kl"].value == pytest.approx(sum(token[0] for token in everything) / len(everything), rel=1e-4)
    assert metrics["kl"].value > 0.01 and metrics["nll"].value != pytest.approx(metrics["teacher_nll"].value, rel=1e-3)
    assert max(token[4] for token in everything) > 1 - 1e-9 and 0.1 < sum(token[5] for token in everything) / len(everything) < 0.9
    error = 0.0
    for low in range(NUM_BINS):
        inside = [token for token in everything if low == min(int(token[4] * NUM_BINS), NUM_BINS - 1)]
        error += abs(sum(token[4] - token[5] for token in inside)) / len(everything)
    assert metrics["ece"].value == pytest.approx(error, rel=1e-4)


def test_the_teacher_agrees_with_itself(write_jsonl, tokenizer, teacher_dir):
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    benchmark = Agreement(data=str(write_jsonl(rows())))
    metrics = benchmark.metrics(grade(benchmark, teacher, tokenizer, teacher_dir))
    assert metrics["kl"].value == 0.0
    assert metrics["top1"].value == 1.0
    assert metrics["nll"].value == metrics["teacher_nll"].value


def test_batching_does_not_matter(write_jsonl, tokenizer, teacher_dir, student):
    path = str(write_jsonl(rows()))
    one, many = (
        {item.id: item for item in grade(Agreement(data=path, batch_size=size), student, tokenizer, teacher_dir)} for size in (1, 9)
    )
    assert one.keys() == many.keys()
    for key, item in one.items():
        assert item.counts == many[key].counts
        assert item.sums == pytest.approx(many[key].sums, rel=1e-5, abs=1e-5)


def test_items_do_not_depend_on_order_and_limit(write_jsonl, tokenizer, teacher_dir, student):
    data = rows(12)
    forwards, backwards = write_jsonl(data, "a.jsonl"), write_jsonl(data[::-1], "b.jsonl")
    one, other = (grade(Agreement(data=str(path), limit=5), student, tokenizer, teacher_dir) for path in (forwards, backwards))
    assert {item.id for item in one} == {item.id for item in other} and len(one) == 5
    larger = grade(Agreement(data=str(forwards), limit=8), student, tokenizer, teacher_dir)
    assert {item.id for item in one} < {item.id for item in larger}


def test_repeated_conversations_count_once(write_jsonl, tokenizer):
    path = write_jsonl([*rows(3), *rows(3)])
    assert len(Agreement(data=[str(path), str(path)]).samples(tokenizer)) == 3
    marked = [{"messages": [row["messages"][0], row["messages"][1] | {"id": 7}]} for row in rows(3)]
    assert len(Agreement(data=str(write_jsonl(rows(3) + marked))).samples(tokenizer)) == 3


def test_answers_to_one_prompt_are_conversations_of_their_own(write_jsonl, tokenizer):
    path = write_jsonl([{"prompt": "Who?", "completion": text} for text in WORDS])
    assert len(Agreement(data=str(path)).samples(tokenizer)) == len(WORDS)


def test_truncation_is_told(write_jsonl, tokenizer, capsys):
    path = write_jsonl(rows(4))
    samples = Agreement(data=str(path), max_length=24).samples(tokenizer)
    assert all(len(sample.ids) <= 24 for sample in samples)
    assert "max_length 24 cut" in capsys.readouterr().err.replace("\n", " ")


def test_a_store_that_lacks_the_texts_is_refused(write_jsonl, tokenizer, student):
    class Empty(ModelTeacher):
        def open(self, tokenizer, needs, device="cpu"):
            class Scorer:
                vocabulary = 10

                def require(self, samples):
                    raise StoreError(f"lacks {len(samples)}")

            return Scorer()

    subject = Subject(student, tokenizer, "cpu", Empty(model="none/none"))
    with pytest.raises(StoreError, match="lacks 2"):
        list(Agreement(data=str(write_jsonl(rows(2)))).run(subject))


def calibration(items):
    return [
        Item(
            str(i),
            {},
            {},
            {"calibration": {"tokens": [0] * 8 + [n] + [0], "confidence": [0] * 8 + [0.85 * n] + [0], "correct": [0] * 8 + [c] + [0]}},
        )
        for i, (n, c) in enumerate(items)
    ]


def test_calibration_error_by_hand():
    """10 tokens of confidence 0.85, 6 of them right."""
    metric = calibration_error(calibration([(4, 2), (6, 4)]))
    assert metric.value == pytest.approx(0.25)
    first, second = abs(0.85 - 2 / 4), abs(0.85 - 4 / 6)
    assert metric.stderr == pytest.approx(math.sqrt(1 / 2 * 2 * ((first - second) / 2) ** 2))
    assert calibration_error(calibration([(4, 2)])).stderr is None
    assert calibration_error([]).value is None


def test_calibration_stderr_is_that_of_a_bootstrap():
    draw = random.Random(3)
    items = calibration([(n, sum(draw.random() < 0.5 for _ in range(n))) for n in (draw.randint(3, 30) for _ in range(60))])
    resampled = [calibration_error(draw.choices(items, k=len(items))).value for _ in range(600)]
    assert calibration_error(items).stderr == pytest.approx(statistics.stdev(resampled), rel=0.15)


def test_bad_data(write_jsonl, tokenizer, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Agreement(data=str(tmp_path / "none.jsonl")).check()
    with pytest.raises(DataError, match=r"data\.jsonl:1: "):
        Agreement(data=str(write_jsonl([{"question": "x"}]))).check()
    Agreement(data=str(write_jsonl(rows(1)))).check()


def test_top_k_teacher_of_all_tokens_is_compared_as_a_dense_one() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, hidden = torch.randn(9, 6, generator=draw), torch.randn(9, 8, generator=draw)
    teacher, student = Head(torch.randn(23, 6, generator=draw)), Head(torch.randn(23, 8, generator=draw))
    targets = torch.arange(9)
    log_probs, ids = torch.log_softmax(teacher(rows), -1).sort(-1, descending=True)
    observed = torch.log_softmax(teacher(rows), -1).gather(-1, targets[:, None]).squeeze(-1)
    dense = _compare(hidden, student, Signal(output=rows, teacher_head=teacher), targets)
    top = _compare(hidden, student, Signal(sparse=TopK(ids, log_probs, {1.0: torch.full((9,), -torch.inf)}), observed=observed), targets)
    torch.testing.assert_close(top, dense, rtol=1e-5, atol=1e-5)
