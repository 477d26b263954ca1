"""A served teacher says what the live one says, whatever happens on the way, and an answer that cannot be true is not believed."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from stub import NAME

import limbeck
from helpers import SENTENCES
from limbeck.batch import TopK
from limbeck.errors import LimbeckError, ModelError, RecipeError, RunError
from limbeck.objectives.base import Needs
from limbeck.recipe import check_files, parse_recipe
from limbeck.teachers import ModelTeacher, ServerTeacher
from limbeck.teachers.client import BadAnswerError, read_answer
from limbeck.teachers.model import observed_log_probs
from limbeck.tokens.pad import collate, pad
from limbeck.tokens.sample import make_sample

OUTPUT = Needs(output=True)
PASSING = [
    "stall",
    "death",
    "garbage",
    "nan",
    "mass",
    "above 0",
    "fewer",
    "more",
    "texts",
    "other ids",
    "far ids",
    "shorter",
    429,
    500,
    503,
]
FATAL = [400, 401, 403, 404, 422]


@pytest.fixture
def samples(tokenizer):
    found = []
    for i, sentence in enumerate(SENTENCES[:4]):
        ids = tokenizer(sentence).input_ids
        found.append(make_sample(ids, [j > 2 + i for j in range(len(ids))], 64))
    return found


def opened(spec, tokenizer, **changes):
    return ServerTeacher(**(spec | changes)).open(tokenizer, OUTPUT)


def top_of(scorer, batch, k):
    """Top k, tail and targets of a live teacher, in float64."""
    rows = scorer.score(batch).output
    log_probs = torch.log_softmax(scorer.head(rows).double(), -1)
    top, ids = log_probs.topk(k)
    rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return TopK(ids, top, {1.0: rest}), observed_log_probs(scorer.head, rows, batch.targets)


def assert_same(signal, live, observed):
    assert torch.equal(signal.sparse.ids, live.ids)
    assert torch.allclose(signal.sparse.log_probs.double(), live.log_probs, atol=1e-5)
    assert torch.allclose(signal.sparse.log_tails[1.0].double().exp(), live.log_tails[1.0].exp(), atol=1e-5)
    assert torch.allclose(signal.observed, observed, atol=1e-5)


@pytest.mark.parametrize("layout", ["rows", "packed", "empty"])
def test_it_says_what_the_live_teacher_says(spec, teacher_dir, tokenizer, samples, layout):
    rows = {"rows": [[sample] for sample in samples], "packed": [samples[:3], samples[3:]], "empty": []}[layout]
    batch, alone = collate(rows, 0), pad(samples if rows else [], 0)
    scorer = opened(spec, tokenizer)
    scorer.expect([batch])
    live, observed = top_of(ModelTeacher(model=str(teacher_dir)).open(tokenizer, OUTPUT), alone, 8)
    scorer.verify_packing()
    assert_same(scorer.score(batch), live, observed)


def test_what_is_expected_is_asked_for_once(spec, server, tokenizer, samples):
    scorer = opened(spec, tokenizer)
    server.asked.clear()
    batch = pad(samples, 0)
    scorer.expect([batch])
    deadline = time.monotonic() + 20
    while len(server.asked) < len(samples) and time.monotonic() < deadline:
        time.sleep(0.01)
    scorer.score(batch)
    assert sorted(server.asked) == sorted(sample.ids.tolist() for sample in samples)
    scorer.score(batch)
    assert len(server.asked) == 2 * len(samples), "an answer is not kept for ever"


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_changes_nothing(spec, server, tokenizer, samples, fault):
    batch = pad(samples, 0)
    scorer = opened(spec, tokenizer)
    expected = scorer.score(batch)
    server.faults.extend([fault, fault])
    found = scorer.score(batch)
    assert not server.faults, "the fault did not happen"
    for name in ("ids", "log_probs"):
        assert torch.equal(getattr(found.sparse, name), getattr(expected.sparse, name))
    assert torch.equal(found.sparse.log_tails[1.0], expected.sparse.log_tails[1.0])
    assert torch.equal(found.observed, expected.observed)
    cause = {"stall": "no answer in time", "death": "no connection"}.get(
        fault, f"status {fault}" if isinstance(fault, int) else "bad answer"
    )
    assert scorer.note == f"2 x {cause}"


@pytest.mark.parametrize("status", FATAL)
def test_a_wrong_question_is_not_asked_again_and_keys_stay_secret(spec, server, tokenizer, samples, status, monkeypatch, capsys):
    monkeypatch.setenv("TINY_KEY", "s3cret-key")
    scorer = opened(spec, tokenizer, key_variable="TINY_KEY")
    server.asked.clear()
    server.faults.append(status)
    with pytest.raises(LimbeckError, match=f"teacher {server.url}: status {status}, and was not asked again") as error:
        scorer.score(pad(samples[:1], 0))
    assert len(server.asked) == 1 and set(server.keys) == {"Bearer s3cret-key"}
    said = str(error.value) + capsys.readouterr().err
    assert "***" in said and "s3cret" not in said


def test_a_server_that_answers_nothing_but_nonsense_is_given_up(spec, server, tokenizer, samples):
    scorer = opened(spec, tokenizer)
    server.faults, server.is_ill = type(server.faults)(["other ids"]), True
    with pytest.raises(RunError, match=r"other token ids than ours; 4 answers of 'tiny-teacher' were like that"):
        scorer.score(pad(samples[:1], 0))


def test_a_server_that_is_gone_is_waited_for_as_long_as_it_says(spec, server, tokenizer, samples):
    scorer = opened(spec, tokenizer, patience_seconds=0.3)
    server.faults, server.is_ill = type(server.faults)([503]), True
    with pytest.raises(RunError, match=r"status 503, for 0.3 seconds \(teacher.patience_seconds\)"):
        scorer.score(pad(samples, 0))


def test_what_was_asked_ahead_ends_with_its_scorer(spec, server, tokenizer, samples):
    scorer = opened(spec, tokenizer, patience_seconds=60)
    server.faults.append(503)
    server.is_ill = True
    scorer.expect([pad(samples, 0)])
    threads = list(scorer._pool._threads)
    del scorer
    for thread in threads:
        thread.join(10)
    assert threads and not any(thread.is_alive() for thread in threads), "an interrupted run would wait for the server's patience"


def test_a_server_without_log_probabilities_is_told_from_one_with_wrong_ones(spec, server, tokenizer, samples):
    server.faults, server.is_ill = type(server.faults)(["no log-probabilities"]), True
    with pytest.raises(RunError, match="expected a server that knows them, such as vLLM"):
        opened(spec, tokenizer)


# ---- what is refused when it is opened, or before


def test_another_model_more_tokens_and_longer_data_are_refused_when_it_is_opened(spec, server, tokenizer, samples):
    with pytest.raises(ModelError, match=f"serves {NAME}, expected teacher.served_name 'tiny-techer'; did you mean '{NAME}'"):
        opened(spec, tokenizer, served_name="tiny-techer")
    server.max_logprobs = 4
    with pytest.raises(LimbeckError, match=r"Requested more than 4 prompt logprobs.*--max-logprobs"):
        opened(spec, tokenizer)
    server.max_logprobs, server.max_model_len = 400, max(len(sample.ids) for sample in samples)
    with pytest.raises(ModelError, match=r"set source.max_length, or start the server with more"):
        opened(spec, tokenizer).require(samples)


def test_another_vocabulary_is_refused(spec, fresh_tokenizer):
    fresh_tokenizer.add_tokens(["<|one|>"])
    vocabulary = json.loads(fresh_tokenizer.backend_tokenizer.to_str())
    first, second = list(vocabulary["model"]["vocab"])[20:22]
    ids = vocabulary["model"]["vocab"]
    ids[first], ids[second] = ids[second], ids[first]
    fresh_tokenizer._tokenizer = type(fresh_tokenizer.backend_tokenizer).from_str(json.dumps(vocabulary))
    with pytest.raises(ModelError, match="ids stand for other bytes"):
        opened(spec, fresh_tokenizer)


@pytest.fixture
def recipe(spec, model_dir, write_jsonl):
    rows = [{"text": sentence} for sentence in SENTENCES]
    return {
        "student": {"model": str(model_dir)},
        "teacher": spec,
        "source": {"type": "dataset", "data": str(write_jsonl(rows)), "max_length": 32},
        "objective": [{"type": "ce"}, {"type": "logits"}],
        "train": {"steps": 2, "batch_size": 4, "micro_batch_size": 2},
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.url=http://me:secret@host/v1"], "teacher.url: found a URL that holds a key"),
        (["teacher.url=host:8000"], "teacher.url: found 'host:8000', expected the base of an API"),
        (["teacher.url=http://host:99999/v1"], "teacher.url: found 'http://host:99999/v1', expected the base of an API"),
        (["objective.1.temperature=2"], "temperature 2"),
        (["objective=[{type: hidden, pairs: [[0, 0]]}]"], "'hidden' term needs a teacher's hidden states"),
    ],
)
def test_a_recipe_that_asks_for_more_is_refused_before_anything_is_asked(recipe, server, overrides, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe, overrides)
    assert not server.asked


def test_a_key_that_is_not_there_is_missed_before_anything_is_asked(recipe, monkeypatch):
    monkeypatch.delenv("TINY_KEY", raising=False)
    found = check_files(parse_recipe(recipe, ["teacher.key_variable=TINY_KEY"]))
    assert found == ["teacher.key_variable: the environment has no TINY_KEY; expected the server's key in it"]
    monkeypatch.setenv("TINY_KEY", "s3cret\nkey")
    (found,) = check_files(parse_recipe(recipe, ["teacher.key_variable=TINY_KEY"]))
    assert "TINY_KEY holds what no header can carry" in found and "s3cret" not in found


def test_a_key_from_a_file_may_end_with_its_line(spec, server, tokenizer, monkeypatch):
    monkeypatch.setenv("TINY_KEY", "s3cret-key\r\n")
    opened(spec, tokenizer, key_variable="TINY_KEY")
    assert set(server.keys) == {"Bearer s3cret-key"}


def test_a_server_that_is_nowhere_is_named_with_the_cause(spec, tokenizer, capsys):
    with pytest.raises(RunError, match=r"teacher http://127\.0\.0\.1:9/v1: no connection \(.*refused.*\), for 2 seconds"):
        opened(spec, tokenizer, url="http://127.0.0.1:9/v1", patience_seconds=2)
    assert "refused" in capsys.readouterr().err


# ---- training


def test_training_from_it_loses_nothing_to_faults_and_to_packing(recipe, server, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_KEY", "s3cret-key")
    plain = limbeck.train(recipe, tmp_path / "plain", ["teacher.key_variable=TINY_KEY"])
    server.faults.extend([None, 503, "garbage", "death", "nan"])
    faulty = limbeck.train(recipe, tmp_path / "faulty")
    packed = limbeck.train(recipe, tmp_path / "packed", ["train.pack_length=64"])
    rows = [[row["loss/logits"] for row in run.metrics()] for run in (plain, faulty, packed)]
    assert rows[0] == rows[1] and not server.faults
    assert np.allclose(rows[0], rows[2], atol=1e-5) and min(rows[0]) > 0
    assert "teacher_nll" in plain.metrics()[0]
    for file in (tmp_path / "plain").rglob("*.json*"):
        assert "s3cret" not in file.read_text()


# ---- reading an answer


def entry(**log_probs):
    return {name.removeprefix("t"): {"logprob": value} for name, value in log_probs.items()}


def answer(*entries):
    return {"choices": [{"prompt_logprobs": [None, *entries]}]}


def read(tree, ids=(1, 5), k=2, vocabulary=10):
    return read_answer(tree, np.array(ids), np.array([0]), k, vocabulary)


def test_the_token_that_is_there_is_not_one_of_the_k():
    told = read(answer(entry(t3=np.log(0.5), t5=np.log(0.1), t4=np.log(0.2))))
    assert told.ids.tolist() == [[3, 4]]
    assert np.allclose(np.exp([*told.log_probs[0], told.log_tail[0], told.observed[0]]), [0.5, 0.2, 0.3, 0.1])


def test_the_mass_of_the_others_is_at_least_that_of_the_token_that_is_there():
    told = read(answer(entry(t3=np.log(0.9), t4=np.log(0.1), t5=np.log(1e-4))))
    assert np.isclose(told.log_tail[0], np.log(1e-4))


def test_padded_rows_get_no_probability():
    """As the live teacher's head is cut to the tokens that there are."""
    told = read(answer(entry(t3=np.log(0.4), t12=np.log(0.2), t5=np.log(0.1))))
    assert told.ids.tolist() == [[3, 3]]
    assert np.allclose(np.exp([*told.log_probs[0], told.log_tail[0], told.observed[0]]), [0.5, 0.0, 0.5, 0.125])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "without prompt_logprobs"),
        (answer(), "log-probabilities of 1 tokens, expected 2"),
        (answer(None), "not keyed by token id"),
        (answer(entry(t5=-1.0, t3=float("inf"))), "not finite"),
        (answer(entry(t5=-1.0, t3=-1.5, t4=-3.0)), "3 log-probabilities of a token that is among the first 2"),
        (answer(entry(t5=-0.1, t3=-0.2)), "add up to 1.7236"),
        (answer(entry(t5=-1.0, t9999=-2.0)), "found token 9999"),
        ({"choices": [{"prompt_logprobs": [None, entry(t5=-1.0, t3=-2.0)], "prompt_token_ids": [1, 6]}]}, "other token ids"),
    ],
)
def test_an_answer_that_cannot_be_true_is_not_believed(tree, message):
    with pytest.raises(BadAnswerError, match=message):
        read(tree)
