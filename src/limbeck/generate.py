"""Batched greedy generation with a KV cache, by transformers' own `generate`.

Every setting is explicit: what a model's generation_config asks for (sampling, penalties, a minimum length) would make two models
answer under different rules. An item's answer does not depend on what it is batched with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import DataError


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    batch_size: int = 8,
    vocabulary: int | None = None,
) -> list[list[int]]:
    """The ids that follow each prompt, in the order of the prompts: at most `max_new_tokens`, the eos that ended them included."""
    answers: dict[int, list[int]] = {}
    for part in answer_batches(model, prompts, max_new_tokens, eos_ids, pad_id, batch_size, vocabulary):
        answers |= part
    return [answers[index] for index in range(len(prompts))]


def answer_batches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    batch_size: int = 8,
    vocabulary: int | None = None,
) -> Iterator[dict[int, list[int]]]:
    """The same batch by batch, as they are ready: answers by the index of their prompt.

    `vocabulary` is the number of real tokens: the padded rows of the head beyond it are never produced.
    """
    if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
        raise DataError(f"prompt {empty[0]} is empty, expected at least one token to go on from")
    refuse_longer(model, max(map(len, prompts), default=0) + max_new_tokens, f"a prompt with max_new_tokens {max_new_tokens}")
    # like lengths together, so that little is padded
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    with _explicit(model, max_new_tokens, list(eos_ids), pad_id, vocabulary):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            rows = _generate_batch(model, [prompts[index] for index in part], pad_id)
            yield {index: _until(row, eos_ids) for index, row in zip(part, rows, strict=True)}


def eos_ids_of(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's eos, and the model's own (the end of a turn is often another token)."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    own = stated if isinstance(stated, list) else [stated]
    return sorted({index for index in (tokenizer.eos_token_id, *own) if index is not None})


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[B, T]`: padded on the left, so that all rows go on from the same column."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def refuse_longer(model: Any, length: int, what: str) -> None:
    """DataError where a text is longer than the model has positions for; past them it would answer noise, or fail inside torch."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise DataError(f"{what}: found {length} tokens, expected at most {limit}, the model's positions")


def _generate_batch(model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> list[list[int]]:
    """New ids of one batch, padding after the eos included."""
    ids, mask = pad_left(prompts, pad_id, next(model.parameters()).device)
    output = model.generate(input_ids=ids, attention_mask=mask)
    return output[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def _until(row: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """Up to and with the first eos; what follows it is padding."""
    ends = [position for position, index in enumerate(row) if index in eos_ids]
    return list(row[: ends[0] + 1]) if ends else list(row)


@contextmanager
def _explicit(model: Any, max_new_tokens: int, eos_ids: list[int], pad_id: int, vocabulary: int | None) -> Iterator[None]:
    """Eval mode, and our generation settings as the model's own: transformers fills what a passed config leaves open from them."""
    from transformers import GenerationConfig

    num_rows = model.get_output_embeddings().weight.shape[0]
    padded = list(range(vocabulary, num_rows)) if vocabulary is not None else []
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,
        suppress_tokens=padded or None,
        use_cache=True,
    )
    before, was_training = model.generation_config, model.training
    model.generation_config = config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = before
        model.train(was_training)
