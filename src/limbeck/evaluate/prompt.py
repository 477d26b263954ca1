"""A question as the ids of a prompt, as a user's turn of the chat template or as plain text; the ids of an answer that follows it, and the
answers that a model gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from limbeck.errors import DataError
from limbeck.evaluate.base import Subject

PromptStyle = Literal["chat", "plain"]


def prompt_text(tokenizer: Any, question: str, style: PromptStyle, where: str) -> str:
    """What the model is to go on from."""
    if style == "plain":
        return f"Question: {question}\nAnswer:"
    if not tokenizer.chat_template:
        raise DataError(f"{where}: the tokenizer has no chat template; set `prompt: plain`")
    messages = [{"role": "user", "content": question}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a foreign program
        raise DataError(f"{where}: the chat template refuses the question: {error or type(error).__name__}") from error


def prompt_ids(tokenizer: Any, text: str, style: PromptStyle) -> list[int]:
    """The ids of a prompt. A chat template writes its own special tokens; before plain text come those that the tokenizer puts there."""
    bare = _encode(tokenizer, text)
    if style == "chat":
        return bare
    full = list(tokenizer(text)["input_ids"])
    starts = (start for start in range(len(full)) if full[start : start + len(bare)] == bare)
    return full[: next(starts, 0)] + bare


def answer_ids(tokenizer: Any, text: str, answer: str, style: PromptStyle) -> list[int]:
    """The ids of an answer behind the prompt `text`, such that prompt ids + answer ids is what the model would see.

    Tokenised together where the prompt's ids stay as they are (SentencePiece writes a word differently at the start of a text), else
    apart: then a token would span the seam, which a model that goes on from the prompt cannot write.
    """
    answer = answer if style == "chat" else f" {answer}"
    before, both = _encode(tokenizer, text), _encode(tokenizer, text + answer)
    if both[: len(before)] == before and len(both) > len(before):
        return both[len(before) :]
    return _encode(tokenizer, answer)


def answer_texts(
    subject: Subject, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, keep_special: bool = False
) -> Iterator[dict[int, tuple[str, bool]]]:
    """Greedy answers batch by batch, by the index of their prompt: the text, and whether it ended within `max_new_tokens`. Special tokens
    other than the last are part of the text where `keep_special` says so."""
    from limbeck.generate import answer_batches, eos_ids_of
    from limbeck.tokens.identity import vocabulary

    tokenizer, eos_ids = subject.tokenizer, eos_ids_of(subject.model, subject.tokenizer)
    size = len(vocabulary(tokenizer))
    for answers in answer_batches(subject.model, prompts, max_new_tokens, eos_ids, tokenizer.pad_token_id or 0, batch_size, size):
        told = {index: (ids[:-1] if ids[-1] in eos_ids else ids, ids[-1] in eos_ids) for index, ids in answers.items()}
        yield {index: (tokenizer.decode(ids, skip_special_tokens=not keep_special), ended) for index, (ids, ended) in told.items()}


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
