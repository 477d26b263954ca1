"""How likely a model finds several answers behind a question. The question, which they share, is read once for all of them.

They go on from its KV cache, which holds for attention to all that came before. A cache of another kind (a sliding window that forgets, a
state that has seen the padding) is not trusted with it: there every answer is read with its whole question.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from limbeck.evaluate.base import Subject

if TYPE_CHECKING:
    from torch import Tensor


def log_probs(
    subject: Subject, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]], shared: bool = True
) -> list[list[float]]:
    """log p(choice | prompt) of every choice of every prompt, in nats; `shared` says whether choices may go on from one cache.

    Only the choices' tokens meet the head.
    """
    import torch

    from limbeck.models import head
    from limbeck.teachers.model import observed_log_probs
    from limbeck.tokens.identity import vocabulary

    answers = list(chain.from_iterable(choices))
    owner = [index for index, each in enumerate(choices) for _ in each]
    targets, real = pad_right(answers, subject.device)
    rows = _behind_cache(subject, prompts, owner, targets) if shared else _whole(subject, prompts, owner, answers, targets.shape[1])
    cut = head(subject.model).cut(len(vocabulary(subject.tokenizer)))
    scores = torch.zeros(targets.shape, dtype=torch.float64)
    scores[real.cpu()] = observed_log_probs(cut, rows[real], targets[real]).double().cpu()
    totals = iter(scores.sum(-1).tolist())
    return [[next(totals) for _ in each] for each in choices]


def shares_cache(model: Any) -> bool:
    """Whether the model's cache holds keys and values of all that was read, and nothing else; found by reading one token."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    from limbeck.models import backbone

    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    caches = _cache(backbone(model)(input_ids=token, position_ids=token, use_cache=True)).values()
    return any(type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers) for cache in caches)


def _cache(read: Any) -> dict[str, Any]:
    """The cache that a model gave, by the name by which it takes it again: `past_key_values`, in newer releases of transformers `cache`."""
    return {name: value for name, value in read.items() if name in ("cache", "past_key_values")}


def _behind_cache(subject: Subject, prompts: Sequence[Sequence[int]], owner: Sequence[int], targets: Tensor) -> Tensor:
    """Last hidden states `[M, W, D]` from which each of the M answers' tokens is predicted."""
    import torch

    from limbeck.generate import pad_left
    from limbeck.models import backbone

    decoder, device = backbone(subject.model), subject.device
    ids, mask = pad_left(prompts, subject.tokenizer.pad_token_id or 0, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    read = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    of = torch.tensor(owner, device=device)
    rows: Tensor = read.last_hidden_state[of, -1:]
    if targets.shape[1] == 1:
        return rows
    cache = _cache(read)
    for its in cache.values():
        its.batch_select_indices(of)
    steps = torch.arange(targets.shape[1] - 1, device=device)
    more = decoder(
        input_ids=targets[:, :-1],
        attention_mask=torch.cat([mask[of], torch.ones_like(targets[:, 1:])], dim=1),
        position_ids=positions[of, -1:] + 1 + steps,
        use_cache=True,
        **cache,
    )
    return torch.cat([rows, more.last_hidden_state], dim=1)


def _whole(
    subject: Subject, prompts: Sequence[Sequence[int]], owner: Sequence[int], answers: Sequence[Sequence[int]], width: int
) -> Tensor:
    """The same without a cache: every answer behind its whole question, padded where causal models do not look."""
    import torch

    from limbeck.models import forward

    texts = [[*prompts[index], *answer[:-1]] for index, answer in zip(owner, answers, strict=True)]
    ids, _ = pad_right(texts, subject.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    hidden, _ = forward(subject.model, ids, positions)
    first = torch.tensor([len(prompts[index]) - 1 for index in owner], device=ids.device)
    columns = (first[:, None] + torch.arange(width, device=ids.device)).clamp(max=ids.shape[1] - 1)
    return hidden[torch.arange(len(texts), device=ids.device)[:, None], columns]


def pad_right(rows: Sequence[Sequence[int]], device: str) -> tuple[Tensor, Tensor]:
    """Ids `[M, W]` and which of them are real. Causal attention hides padding that comes last."""
    import torch

    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        real[index, : len(row)] = True
    return ids.to(device), real.to(device)
