"""The shared fixtures are what other tests take them for."""

from __future__ import annotations

import pytest
import torch

from helpers import tiny_model


def test_tokenizer(tokenizer):
    text = "What is the weather in Zürich? 🦊\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 300 <= len(tokenizer) <= 512
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2


def test_saved_tokenizer(tokenizer, tokenizer_dir):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("tied", [True, False])
def test_tiny_model(tied, make_model_dir):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = tiny_model(tied=tied, layers=2, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    ids = torch.arange(10)[None]
    loaded = AutoModelForCausalLM.from_pretrained(make_model_dir(tied=tied, layers=2, seed=1))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
