"""Bits per byte by brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from helpers import SENTENCES, make_tokenizer
from limbeck.evaluate import BitsPerByte, Subject
from limbeck.evaluate.bits_per_byte import bytes_per_token

TEXTS = ("The dog sleeps.", "Zürich ☀ 🦊!", "two and three make five")


def grade(benchmark, model, tokenizer):
    with torch.no_grad():
        return list(benchmark.run(Subject(model, tokenizer)))


def test_brute_force(write_jsonl, tokenizer, bigram_model, random_table):
    """-log2 p of each token of the answer but the eos, over the length of the answer's text in UTF-8."""
    log2 = random_table.double().log_softmax(-1) / math.log(2)
    path = write_jsonl([{"prompt": "Say:", "completion": text} for text in TEXTS])
    benchmark = BitsPerByte(data=str(path), batch_size=2)
    items = grade(benchmark, bigram_model(random_table), tokenizer)
    expected = {}
    for text in TEXTS:
        ids = tokenizer("Say:")["input_ids"][-1:] + tokenizer(text)["input_ids"]
        bits = -sum(float(log2[a, b]) for a, b in itertools.pairwise(ids))
        expected[len(text.encode())] = bits
    assert {item.counts["bits_per_byte"]: item.sums["bits_per_byte"] for item in items} == pytest.approx(expected, rel=1e-4)
    value = benchmark.metrics(items)["bits_per_byte"]
    assert value.value == pytest.approx(sum(expected.values()) / sum(expected), rel=1e-4)
    assert not value.higher_is_better


def test_messages_score_the_assistants_text_alone(write_jsonl, tokenizer, bigram_model, random_table):
    conversation = [{"role": "user", "content": "How is the weather?"}, {"role": "assistant", "content": "It is sunny in Zürich."}]
    items = grade(BitsPerByte(data=str(write_jsonl([{"messages": conversation}]))), bigram_model(random_table), tokenizer)
    assert [item.counts["bits_per_byte"] for item in items] == [len("It is sunny in Zürich.".encode())]


def test_a_model_that_knows_nothing(write_jsonl, tokenizer, bigram_model):
    """It spends log2 V per token, so that the value is that times tokens per byte."""
    path = write_jsonl([{"prompt": "Say:", "completion": SENTENCES[0]}])
    for each in (tokenizer, make_tokenizer(vocab_size=280)):
        benchmark = BitsPerByte(data=str(path))
        items = grade(benchmark, bigram_model(torch.zeros(len(each), len(each))), each)
        expected = len(each(SENTENCES[0])["input_ids"]) * math.log2(len(each)) / len(SENTENCES[0].encode())
        assert benchmark.metrics(items)["bits_per_byte"].value == pytest.approx(expected, rel=1e-4)


def test_bytes_of_tokens(tokenizer):
    sizes = bytes_per_token(tokenizer)
    assert len(sizes) == len(tokenizer)
    assert [sizes[i] for i in range(3)] == [0, 0, 0]
    text = "The fox 🦊 in Zürich"
    assert sum(sizes[i] for i in tokenizer(text)["input_ids"]) == len(text.encode())


def test_added_tokens_that_are_text_count(fresh_tokenizer):
    fresh_tokenizer.add_tokens(["<tool_call>"])
    fresh_tokenizer.add_tokens(["<|marker|>"], special_tokens=True)
    assert bytes_per_token(fresh_tokenizer)[-2:] == [len("<tool_call>"), 0]


def test_no_text_at_all(write_jsonl, tokenizer, bigram_model, random_table):
    """An answer that is only an end of turn has no bytes; the mean over nothing is none, not zero."""
    benchmark = BitsPerByte(data=str(write_jsonl([{"prompt": "a", "completion": ""}])))
    metric = benchmark.metrics(grade(benchmark, bigram_model(random_table), tokenizer))["bits_per_byte"]
    assert (metric.value, metric.num_items) == (None, 0)
