"""Multiple choice: log-probabilities against full logits, choices by a rigged model, and every bad row."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MistralConfig,
)

from helpers import tiny_model
from limbeck.errors import DataError
from limbeck.evaluate import MultipleChoice, Subject
from limbeck.evaluate.likelihood import log_probs, shares_cache
from limbeck.evaluate.multiple_choice import Case, _grade, extract_letter, read_cases


def row(name="q-1", question="What is the weather?", choices=("sunny", "the dog"), answer=0, **more):
    return {"id": name, "question": question, "choices": list(choices), "answer": answer, **more}


ROWS = [
    row("a", "What is the weather in Paris?", ("It is sunny today.", "five"), 0),
    row("b", "Add two and three.", ("five", "The fox jumps over the lazy dog", "3"), 0),
    row("c", "Who?", ("a", "b", "c", "d"), 3, passage="A teacher shows a student how to answer."),
    row("d", "How many dogs?", ("🦊", "two", "three dogs"), 1),
]


def run(benchmark, model, tokenizer):
    with torch.no_grad():
        return {item.id: item for item in benchmark.run(Subject(model, tokenizer))}


def tiny_gpt2(vocab):
    """Positions are learned vectors here: unlike Llama's rotations, a shift of them shows."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)).eval()


def small(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def sliding(vocab):
    """Attention that reaches back 4 tokens, so that its cache forgets most of a prompt."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return small(MistralConfig(vocab_size=vocab, sliding_window=4, initializer_range=0.2, **sizes))


def mamba(vocab):
    """A state in the place of a cache; padding on the left would change it."""
    return small(MambaConfig(vocab_size=vocab, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.2))


def llama(vocab):
    return tiny_model()


@pytest.mark.parametrize(("make", "shared"), [(tiny_gpt2, True), (llama, True), (sliding, False), (mamba, False)])
def test_which_caches_are_shared(tokenizer, make, shared):
    with torch.no_grad():
        assert shares_cache(make(len(tokenizer))) is shared


@pytest.mark.parametrize("method", ["cloze", "letter"])
def test_with_and_without_a_shared_cache(write_jsonl, tokenizer, monkeypatch, method):
    benchmark, model = MultipleChoice(data=str(write_jsonl(ROWS)), method=method, batch_size=3), tiny_model()
    shared = run(benchmark, model, tokenizer)
    monkeypatch.setattr("limbeck.evaluate.multiple_choice.shares_cache", lambda model: False)
    whole = run(benchmark, model, tokenizer)
    assert shared.keys() == whole.keys()
    for key, item in shared.items():
        assert item.detail["log_probs"] == pytest.approx(whole[key].detail["log_probs"], abs=2e-4)


@pytest.mark.parametrize(
    ("make", "shared"), [(tiny_gpt2, True), (tiny_gpt2, False), (llama, True), (llama, False), (sliding, False), (mamba, False)]
)
def test_log_probs_by_definition(tokenizer, make, shared):
    """Prompts and choices of unlike lengths, in one batch, against the full logits of each alone."""
    model = make(len(tokenizer))
    draw = random.Random(0)
    ids = lambda n: [draw.randrange(3, len(tokenizer)) for _ in range(n)]  # noqa: E731
    prompts = [ids(n) for n in (9, 1, 5)]
    choices = [[ids(1), ids(7)], [ids(3), ids(3), ids(2)], [ids(4), ids(1)]]
    with torch.no_grad():
        found = log_probs(Subject(model, tokenizer), prompts, choices, shared)
        for prompt, answers, scores in zip(prompts, choices, found, strict=True):
            for answer, score in zip(answers, scores, strict=True):
                logits = model(torch.tensor([prompt + answer])).logits[0, :, : len(tokenizer)].double().log_softmax(-1)
                expected = sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
                assert score == pytest.approx(expected, rel=1e-4)


def test_single_token_choices_need_no_second_forward(tokenizer):
    model = tiny_model()
    calls = []
    model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        found = log_probs(Subject(model, tokenizer), [[5, 6, 7]], [[[8], [9]]])
        expected = model(torch.tensor([[5, 6, 7]])).logits[0, -1, : len(tokenizer)].log_softmax(-1)[[8, 9]]
    assert calls == [1, 1]
    assert found[0] == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_model_that_prefers_a_choice(write_jsonl, tokenizer, bigram_model, batch_size):
    """Every token of one choice of each question is made likely after its predecessor: that choice is chosen, right or wrong."""
    preferred = {"a": 0, "b": 1, "c": 3, "d": 0}
    table = torch.zeros(len(tokenizer), len(tokenizer))
    start = tokenizer("<|im_start|>assistant\n")["input_ids"][-1]
    for each in ROWS:
        ids = [start, *tokenizer(each["choices"][preferred[each["id"]]])["input_ids"]]
        for before, after in itertools.pairwise(ids):
            table[before, after] = 20.0
    benchmark = MultipleChoice(data=str(write_jsonl(ROWS)), batch_size=batch_size)
    items = run(benchmark, bigram_model(table), tokenizer)
    assert {key: item.detail["chosen"] for key, item in items.items()} == preferred
    assert {key: item.detail["expected"] for key, item in items.items()} == {"a": 0, "b": 0, "c": 3, "d": 1}
    metrics = benchmark.metrics(list(items.values()))
    assert metrics["acc_norm"].value == 0.5
    assert metrics["acc_norm"].chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 3) / 4) == metrics["acc"].chance
    assert list(metrics) == ["acc_norm", "acc"]
    assert (metrics["acc_norm"].num_items, metrics["acc_norm"].ceiling) == (4, 1.0)


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_a_model_that_prefers_a_letter(write_jsonl, tokenizer, bigram_model, style):
    table = torch.zeros(len(tokenizer), len(tokenizer))
    ids = tokenizer("B" if style == "chat" else " B")["input_ids"]
    start = tokenizer("<|im_start|>assistant\n" if style == "chat" else "Answer:")["input_ids"][-1]
    for before, after in itertools.pairwise([start, *ids]):
        table[before, after] = 20.0
    benchmark = MultipleChoice(data=str(write_jsonl(ROWS)), method="letter", prompt=style)
    items = run(benchmark, bigram_model(table), tokenizer)
    assert {key: item.detail["chosen"] for key, item in items.items()} == dict.fromkeys("abcd", 1)
    assert [len(items[key].detail["log_probs"]) for key in "abcd"] == [2, 3, 4, 3]
    metrics = benchmark.metrics(list(items.values()))
    assert list(metrics) == ["acc"] and metrics["acc"].value == 0.25
    assert metrics["acc"].chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 3) / 4)


@pytest.mark.parametrize(("written", "chosen"), [("C", 2), ("maybe", None)])
def test_letters_that_are_written(write_jsonl, tokenizer, bigram_model, written, chosen):
    """Only one of the questions has a fourth choice, and three have a third."""
    ids = [tokenizer("<|im_start|>assistant\n")["input_ids"][-1], *tokenizer(written)["input_ids"], tokenizer.eos_token_id]
    table = torch.zeros(len(tokenizer), len(tokenizer))
    for before, after in itertools.pairwise(ids):
        table[before, after] = 20.0
    benchmark = MultipleChoice(data=str(write_jsonl(ROWS)), method="generate")
    items = run(benchmark, bigram_model(table), tokenizer)
    assert {item.detail["text"] for item in items.values()} == {written}
    assert {key: item.detail["chosen"] for key, item in items.items()} == {"a": None} | dict.fromkeys("bcd", chosen)
    metrics = benchmark.metrics(list(items.values()))
    assert list(metrics) == ["acc", "answered"]
    assert metrics["answered"].value == (0.75 if chosen else 0.0) and metrics["answered"].chance is None
    assert metrics["acc"].value == 0.0 and metrics["acc"].num_items == 4


def test_the_choices_are_shown_for_letters_only(tokenizer):
    case = Case("q", "Who?", ("the dog", "five"), 0, "")
    ask = lambda **settings: MultipleChoice(data="d", **settings)._question(case)  # noqa: E731
    assert ask() == "Who?"
    assert ask(method="letter", prompt="plain") == "Who?\nA. the dog\nB. five"
    assert ask(method="generate") == "Who?\nA. the dog\nB. five\nAnswer with the letter of the right choice only."


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B.", "B"),
        ("(B) five", "B"),
        ("**B**", "B"),
        ("B. The dog", "B"),
        ("B\nbecause", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is (B), not A.", "B"),
        ("Answer: A. No, the answer is: C", "C"),
        ("the right choice is B", "B"),
        ("A dog is B", ""),
        ("A", "A"),
        ("I think so", ""),
        ("E", ""),
        ("b", ""),
        ("The answer is Berlin", ""),
        ("The answer is A's", ""),
        ("", ""),
    ],
)
def test_extraction(text, letter):
    assert extract_letter(text, 4) == letter


def test_more_choices_than_letters(write_jsonl):
    path = str(write_jsonl([row(choices=[f"c{i}" for i in range(27)])]))
    MultipleChoice(data=path).check()
    with pytest.raises(DataError, match=r"data\.jsonl:1: choices: found 27, expected at most 26, a letter for each; set `method: cloze`"):
        MultipleChoice(data=path, method="letter").check()


def test_normalised_by_bytes(write_jsonl, tokenizer, bigram_model):
    """A model that knows nothing takes the choice of fewest tokens, and normalised the one of most bytes per token."""
    choices = ("x", "The quick brown fox jumps over the lazy dog", "🦊")
    num_tokens = [len(tokenizer(choice)["input_ids"]) for choice in choices]
    per_byte = [count / len(choice.encode()) for count, choice in zip(num_tokens, choices, strict=True)]
    assert num_tokens.index(min(num_tokens)) == 0 and per_byte.index(min(per_byte)) == 1
    model = bigram_model(torch.zeros(len(tokenizer), len(tokenizer)))
    benchmark = MultipleChoice(data=str(write_jsonl([row(choices=choices, answer=1)])))
    (item,) = run(benchmark, model, tokenizer).values()
    assert (item.detail["chosen"], item.detail["chosen_unnormalised"]) == (1, 0)
    assert (item.sums, item.detail["num_choices"]) == ({"acc_norm": 1.0, "acc": 0.0}, 3)
    uniform = torch.tensor(float(len(tokenizer))).log().item()
    assert item.detail["log_probs"] == pytest.approx([-count * uniform for count in num_tokens], abs=1e-3)


def test_length_is_in_bytes_not_characters():
    item = _grade(Case("q", "?", ("🦊", "abcd"), 0, ""), [-4.0, -5.0])
    assert item.detail["chosen"] == 0


def test_prompt_styles_differ(write_jsonl, tokenizer, fresh_tokenizer):
    path = str(write_jsonl(ROWS))
    model = tiny_model()
    chat, plain = (run(MultipleChoice(data=path, prompt=style), model, tokenizer) for style in ("chat", "plain"))
    assert all(chat[key].detail["log_probs"] != plain[key].detail["log_probs"] for key in chat)
    fresh_tokenizer.chat_template = None
    assert run(MultipleChoice(data=path, prompt="plain"), model, fresh_tokenizer) == plain
    with pytest.raises(DataError, match="no chat template; set `prompt: plain`"):
        run(MultipleChoice(data=path), model, fresh_tokenizer)


def test_passage_is_read(write_jsonl, tokenizer):
    model = tiny_model()
    with_passage = run(MultipleChoice(data=str(write_jsonl([row(passage="It rains.")]))), model, tokenizer)["q-1"]
    without = run(MultipleChoice(data=str(write_jsonl([row(passage="")]))), model, tokenizer)["q-1"]
    assert with_passage.detail["log_probs"] != without.detail["log_probs"]
    assert run(MultipleChoice(data=str(write_jsonl([row()]))), model, tokenizer)["q-1"] == without


def test_items_do_not_depend_on_order_limit_and_batch(write_jsonl, tokenizer):
    data = [row(f"q-{i}", f"What is {i}?", ("sunny", "five dogs", "an answer"), i % 3) for i in range(12)]
    model = tiny_model()
    forwards, backwards = str(write_jsonl(data, "a.jsonl")), str(write_jsonl(data[::-1], "b.jsonl"))
    everything = run(MultipleChoice(data=forwards, batch_size=5), model, tokenizer)
    five = run(MultipleChoice(data=forwards, limit=5, batch_size=1), model, tokenizer)
    other = run(MultipleChoice(data=backwards, limit=5), model, tokenizer)
    assert len(everything) == 12 and five.keys() == other.keys() and len(five) == 5
    for key, item in five.items():
        assert item.detail["chosen"] == other[key].detail["chosen"] == everything[key].detail["chosen"]
        assert item.detail["log_probs"] == pytest.approx(everything[key].detail["log_probs"], abs=2e-3)


def test_too_long_for_the_model(write_jsonl, tokenizer):
    path = write_jsonl([row(question="weather " * 600)])
    with pytest.raises(DataError, match=r"data\.jsonl:1: found \d+ tokens, expected at most 512"):
        run(MultipleChoice(data=str(path)), tiny_model(), tokenizer)


BAD_ROWS = {
    "not an object": ([1], "found .1., expected an object with id, question, choices, answer"),
    "no answer": ({"id": "x", "question": "q", "choices": ["a", "b"], "anser": 0}, "`answer` is missing.*did you mean 'answer'"),
    "null answer": (row(answer=None), "`answer` is missing"),
    "answer as letter": (row(answer="A"), "answer: found 'A', expected the index of the right choice, 0 to 1"),
    "answer beyond": (row(answer=2), "answer: found 2, expected the index of the right choice, 0 to 1"),
    "answer negative": (row(answer=-1), "answer: found -1"),
    "answer true": (row(answer=True), "answer: found True"),
    "one choice": (row(choices=["a"]), "choices: found .'a'., expected a list of at least two texts"),
    "empty choice": (row(choices=["a", " "]), "choices: found .* none empty"),
    "choices as text": ({**row(), "choices": "ab"}, "choices: found 'ab'"),
    "choices as numbers": (row(choices=[1, 2]), "choices: found .1, 2."),
    "empty question": (row(question=" "), "question: found ' ', expected a text"),
    "question as number": (row(question=3), "question: found 3, expected a text"),
    "passage as list": (row(passage=["x"]), "passage: found .'x'., expected a text"),
    "id as list": ({**row(), "id": [1]}, "id: found .1., expected a text or number"),
    "empty id": (row(name=""), "id: found '', expected a text or number"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(write_jsonl, bad, message):
    path = write_jsonl([row("good"), bad])
    with pytest.raises(DataError, match=rf"data\.jsonl:2: {message}"):
        MultipleChoice(data=str(path)).check()


def test_bad_files(write_jsonl, tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl:2: id 'q-1' is that of .*data\.jsonl:1 too"):
        read_cases(str(write_jsonl([row(), row()])))
    with pytest.raises(DataError, match="found no rows"):
        read_cases(str(write_jsonl([])))
    with pytest.raises(DataError, match=r"dat\.jsonl.*did you mean .*data\.jsonl"):
        read_cases(str(tmp_path / "dat.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"id": 1,\n')
    with pytest.raises(DataError, match=r"broken\.jsonl:1: not readable as JSON"):
        read_cases(str(tmp_path / "broken.jsonl"))


def test_number_ids(write_jsonl):
    assert [case.id for case in read_cases(str(write_jsonl([row(7), row(8)])))] == ["7", "8"]
