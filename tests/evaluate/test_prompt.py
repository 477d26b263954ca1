"""Prompts and answers as ids."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from limbeck.errors import DataError
from limbeck.evaluate.prompt import answer_ids, prompt_ids, prompt_text


def test_chat(tokenizer):
    text = prompt_text(tokenizer, "How are you?", "chat", "b")
    assert text == "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    ids = prompt_ids(tokenizer, text, "chat")
    assert ids == tokenizer(text)["input_ids"]
    full = ids + answer_ids(tokenizer, text, "It is sunny.", "chat")
    assert tokenizer.decode(full) == text + "It is sunny."


def test_plain(tokenizer):
    text = prompt_text(tokenizer, "Why?", "plain", "b")
    assert text == "Question: Why?\nAnswer:"
    full = prompt_ids(tokenizer, text, "plain") + answer_ids(tokenizer, text, "the dog", "plain")
    assert full == tokenizer("Question: Why?\nAnswer: the dog")["input_ids"]


def test_plain_begins_with_the_tokenizers_own_start_and_without_its_end(fresh_tokenizer):
    fresh_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    assert fresh_tokenizer("a")["input_ids"][::2] == [1, 2]
    ids = prompt_ids(fresh_tokenizer, "Question: Why?\nAnswer:", "plain")
    assert ids[0] == 1 and 2 not in ids and 1 not in ids[1:]
    assert 1 not in answer_ids(fresh_tokenizer, "Question: Why?\nAnswer:", "no", "plain")


def test_an_answer_that_merges_with_the_prompt_is_tokenised_apart(tokenizer):
    """What the model goes on from is the prompt's ids, so they may not change with the answer."""
    text, answer = "the wea", "ther in Paris is sunny"
    before, both = (tokenizer(each)["input_ids"] for each in (text, text + answer))
    assert both[: len(before)] != before and len(both) > len(before)
    assert answer_ids(tokenizer, text, answer, "chat") == tokenizer(answer)["input_ids"]


def test_no_template(fresh_tokenizer):
    fresh_tokenizer.chat_template = None
    with pytest.raises(DataError, match="mine: the tokenizer has no chat template; set `prompt: plain`"):
        prompt_text(fresh_tokenizer, "x", "chat", "mine")


def test_template_that_refuses(fresh_tokenizer):
    fresh_tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(DataError, match="mine: the chat template refuses the question: no users here"):
        prompt_text(fresh_tokenizer, "x", "chat", "mine")
