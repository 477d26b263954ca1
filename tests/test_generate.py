"""Generation: equal to a step-by-step argmax without a cache, whatever the batch and whatever the model's own generation_config says."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from helpers import tiny_model
from limbeck.errors import DataError
from limbeck.generate import answer_batches, eos_ids_of, generate, pad_left
from limbeck.models import recompute_activations

EOS, PAD = 2, 2
PROMPTS = [[5, 9, 31], [7], [12, 12, 80, 41, 300, 6, 17], [100, 200], [33, 8, 250, 19, 77]]


def by_hand(model, prompt, max_new_tokens, eos_ids, vocabulary=None):
    """Argmax of the full logits, one token after the other, no cache, no batch."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1, :vocabulary]
        ids.append(int(logits.argmax()))
        if ids[-1] in eos_ids:
            break
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_equals_stepwise_argmax_in_any_batch(model, batch_size):
    with torch.no_grad():
        expected = [by_hand(model, prompt, 12, [EOS]) for prompt in PROMPTS]
    found = generate(model, PROMPTS, 12, [EOS], PAD, batch_size)
    assert found == expected
    assert len({tuple(row) for row in found}) == len(PROMPTS)


def test_learned_positions():
    """Padding on the left must not shift them."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)).eval()
    with torch.no_grad():
        assert generate(model, PROMPTS, 12, [EOS], PAD, 5) == [by_hand(model, prompt, 12, [EOS]) for prompt in PROMPTS]


def test_stops_after_its_own_eos(model):
    """Each row ends at the first eos, which it keeps; the others go on."""
    free = generate(model, PROMPTS, 12, [], PAD)
    eos = free[0][3]
    found = generate(model, PROMPTS, 12, [eos], eos, batch_size=8)  # padded with its eos, as many tokenizers do
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert found == expected
    assert found[0][-1] == eos and len(found[0]) <= 4
    assert any(len(row) == 12 for row in found)


def test_several_ends(model):
    free = generate(model, PROMPTS[:1], 12, [], PAD)[0]
    ends = [free[5], free[2]]
    assert generate(model, PROMPTS[:1], 12, ends, PAD)[0] == free[: 1 + min(free.index(end) for end in ends)]


def test_padded_rows_are_never_produced():
    model = tiny_model(tied=False)
    vocabulary = model.config.vocab_size - 5
    with torch.no_grad():
        # hidden states of unit-ish norm: a padded row that doubles the best real one wins wherever that is positive
        model.lm_head.weight[vocabulary:] = 3 * model.lm_head.weight[:5]
    assert any(index >= vocabulary for row in generate(model, PROMPTS, 30, [], PAD) for index in row)
    cut = generate(model, PROMPTS, 30, [], PAD, vocabulary=vocabulary)
    assert all(index < vocabulary for row in cut for index in row)
    with torch.no_grad():
        assert cut == [by_hand(model, prompt, 30, [], vocabulary) for prompt in PROMPTS]


def test_settings_of_the_model_do_not_count_and_are_restored(model):
    expected = generate(model, PROMPTS, 8, [EOS], PAD)
    changed = copy.deepcopy(model).train()
    changed.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, min_new_tokens=8, max_length=4, eos_token_id=expected[0][0]
    )
    before = changed.generation_config.to_dict()
    assert generate(changed, PROMPTS, 8, [EOS], PAD) == expected
    assert changed.generation_config.to_dict() == before
    assert changed.training


def test_restored_after_an_error(model):
    changed = copy.deepcopy(model).train()
    before = changed.generation_config
    with pytest.raises(IndexError):
        generate(changed, [[10**6]], 2, [EOS], PAD)
    assert changed.generation_config is before and changed.training


def test_under_gradient_checkpointing(model):
    """The trainer leaves it on; the cache must still be used rightly."""
    changed = copy.deepcopy(model)
    recompute_activations(changed)
    changed.train()
    assert generate(changed, PROMPTS, 8, [EOS], PAD) == generate(model, PROMPTS, 8, [EOS], PAD)


def test_answers_come_batch_by_batch(model):
    """As they are ready, by the index of their prompt: together they are what comes at once."""
    parts = list(answer_batches(model, PROMPTS, 2, [EOS], PAD, batch_size=2))
    assert [len(part) for part in parts] == [2, 2, 1]
    together = {index: answer for part in parts for index, answer in part.items()}
    assert [together[index] for index in range(len(PROMPTS))] == generate(model, PROMPTS, 2, [EOS], PAD)


def test_nothing_to_do(model):
    assert generate(model, [], 4, [EOS], PAD) == []


@pytest.mark.parametrize(
    ("prompts", "tokens", "message"), [([[1], []], 4, "prompt 1 is empty"), ([[1] * 500], 13, "513 tokens, expected at most 512")]
)
def test_bad_prompts(model, prompts, tokens, message):
    with pytest.raises(DataError, match=message):
        generate(model, prompts, tokens, [EOS], PAD)


def test_eos_ids(tokenizer):
    model = tiny_model()
    assert eos_ids_of(model, tokenizer) == [2]
    model.generation_config.eos_token_id = [7, 2]
    assert eos_ids_of(model, tokenizer) == [2, 7]
    model.generation_config.eos_token_id = None
    assert eos_ids_of(model, tokenizer) == [2]


def test_pad_left():
    ids, mask = pad_left([[5, 6, 7], [8]], 0, "cpu")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
