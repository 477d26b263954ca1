"""Every term in a training step of a tiny model: accumulation, padding, and tokens that are not scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.cases import HIDDEN_TERMS, OUTPUT_TERMS, TEMPERATURES
from helpers import tiny_model
from limbeck.batch import Batch, Signal, TopK
from limbeck.learner import Learner
from limbeck.objectives import Term
from limbeck.objectives.head import Head
from limbeck.tokens.datasets import read_conversations
from limbeck.tokens.pad import pad
from limbeck.tokens.render import render_all
from limbeck.tokens.sample import Sample

LAYERS, WIDTH = 3, 24
TERMS: dict[str, Term] = {
    name: term for name, term in OUTPUT_TERMS.items() if getattr(term, "temperature", 2.0) == 2.0 and not term.is_gated
} | HIDDEN_TERMS


@pytest.fixture(scope="module")
def samples(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    from helpers import write_jsonl

    rows = [{"prompt": "The weather", "completion": " in Paris is sunny." * (1 + i)} for i in range(3)]
    return render_all(read_conversations(write_jsonl(tmp_path_factory.mktemp("data") / "d.jsonl", rows)), tokenizer, 64)[0]


@pytest.fixture(scope="module")
def student() -> Any:
    return tiny_model(layers=2, seed=1)


def score(batch: Batch, support: str, vocabulary: int) -> Signal:
    """A teacher that says the same of a token wherever it stands: its numbers follow from the sample and the offset."""

    def numbers(positions: Tensor, width: int) -> Tensor:
        keys = batch.sample_ids.flatten()[positions] % 9973 + 10007 * batch.offsets.flatten()[positions]
        return torch.sin(keys.double()[:, None] * torch.arange(1, width + 1, dtype=torch.float64)).float() * 3

    hidden = {layer: numbers(batch.represented, WIDTH) for layer in range(LAYERS)}
    output = numbers(batch.scored, WIDTH)
    head = Head(torch.sin(torch.arange(vocabulary * WIDTH, dtype=torch.float32) ** 2).reshape(vocabulary, WIDTH) / 3)
    if support == "dense":
        return Signal(output=output, teacher_head=head, hidden=hidden)
    logits = head(output)
    top, ids = logits.log_softmax(-1).topk(6, dim=-1)
    tails = {t: (logits / t).log_softmax(-1).scatter(-1, ids, -torch.inf).logsumexp(-1) for t in TEMPERATURES}
    return Signal(sparse=TopK(ids, top, tails), hidden=hidden)


def step(learner: Learner, term: Term, batches: list[Batch], support: str) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """Loss, gradients of parameters, and of the last hidden states of each microbatch."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = learner.student.model.norm.register_forward_hook(keep)
    learner.zero_grad()
    total, count = 0.0, sum(batch.counts[term.count] for batch in batches)
    for batch in batches:
        loss, _ = learner(batch, score(batch, support, learner.vocabulary), {"x": 1 / count})
        loss.backward()
        total += loss.item()
    handle.remove()
    grads = {name: parameter.grad.clone() for name, parameter in learner.named_parameters() if parameter.grad is not None}
    return total, grads, [state.grad.flatten(0, 1) for state in kept]


@pytest.mark.parametrize("support", ["dense", "top_k"])
@pytest.mark.parametrize("name", TERMS)
def test_microbatches_and_padding_do_not_matter_and_unscored_tokens_have_no_gradient(
    name: str, support: str, samples: list[Sample], student: Any, tokenizer: Any
) -> None:
    term = TERMS[name]
    if name in HIDDEN_TERMS:
        if support != "dense":
            pytest.skip("a hidden term does not see the output")
        term = term.model_copy(update={"pairs": [(0, 1), (1, 2)]})
    elif term.refuses(support, None):  # type: ignore[attr-defined]
        pytest.skip("not declared")
    learner = Learner(student, {"x": term}, len(tokenizer), LAYERS, WIDTH, chunks=2).train()
    together = pad(samples, 2)
    loss, grads, (last,) = step(learner, term, [together], support)
    others = step(learner, term, [pad(samples[:1], 0), pad([], 2), pad(samples[1:], 2)], support)
    assert loss > 0 and others[0] == pytest.approx(loss, rel=1e-5)
    largest = max(grad.abs().max() for grad in grads.values())
    for key in grads:
        # matmuls of other shapes sum in another order, and of a skewed divergence's terms most cancels: 1.1e-5 was seen on one processor
        assert (grads[key] - others[1][key]).abs().max() <= 4e-5 * largest, key
    if name in OUTPUT_TERMS:
        unscored = torch.ones(len(last), dtype=torch.bool)
        unscored[together.scored] = False
        assert not last[unscored].any() and last[together.scored].any()
