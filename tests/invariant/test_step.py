"""Equivalences of the training step: whatever should not matter does not, in loss and in every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import tiny_model
from limbeck.batch import Batch, Signal
from limbeck.capture import capture
from limbeck.learner import Learner
from limbeck.models import recompute_activations
from limbeck.objectives import CrossEntropy, Hidden, Logits
from limbeck.objectives.base import Needs, Term, active, needs_of
from limbeck.sources.base import microbatches
from limbeck.teachers import ModelTeacher, StoreTeacher
from limbeck.tokens.datasets import read_conversations
from limbeck.tokens.pack import pack
from limbeck.tokens.pad import collate, pad
from limbeck.tokens.render import render_all
from limbeck.tokens.sample import Sample

OBJECTIVES: dict[str, list[Term]] = {
    "ce": [CrossEntropy()],
    "logits": [CrossEntropy(weight=0.5), Logits()],
    "reverse_kl": [Logits(divergence="reverse_kl", temperature=2.0)],
    "hidden": [Hidden(pairs=[(0, 1), (1, 3)])],
    "everything": [CrossEntropy(weight=0.3), Logits(temperature=2.0), Hidden(num_pairs=2, measure="cosine")],
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    words = ["weather", "Paris", "teacher", "student", "answer", "five", "fox", "dog", "sunny", "sleeps", "lazy", "quick"]
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(words[: 2 + i % 4])},
                {"role": "assistant", "content": " ".join(words[i % 5 : 4 + i])},
            ]
        }
        for i in range(8)
    ]


@pytest.fixture(scope="module")
def data(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers import write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


@pytest.fixture(scope="module")
def samples(data: Path, tokenizer: Any) -> list[Sample]:
    return render_all(read_conversations(data), tokenizer, 64)[0]


@pytest.fixture(scope="module")
def teacher_dir(make_model_dir: Callable[..., Path]) -> Path:
    return make_model_dir(layers=4, width=48, seed=5)


@pytest.fixture(params=["padded", "packed"])
def together(request: pytest.FixtureRequest) -> Callable[[Sequence[Sample]], Batch]:
    """One batch of several samples: each with a row of its own, or in shared rows."""

    def make(samples: Sequence[Sample]) -> Batch:
        rows = pack(samples, 64 if request.param == "packed" else 0)
        assert (len(rows) < len(samples)) == (request.param == "packed")
        return collate(rows, 2)

    return make


def _learner(objective: str, tokenizer: Any, tied: bool = True, **settings: Any) -> Learner:
    settings = {"teacher_layers": 4, "teacher_width": 48, "chunks": 2} | settings
    return Learner(tiny_model(tied=tied, layers=2, seed=1), active(OBJECTIVES[objective]), len(tokenizer), **settings).train()


def _score(teacher: Any, tokenizer: Any, objective: str) -> Callable[[Batch], Signal]:
    needs = needs_of(active(OBJECTIVES[objective]), 2, 4)
    return teacher.open(tokenizer, needs).score if needs.anything else lambda batch: Signal()


def _run(learner: Learner, batches: Sequence[Batch], score: Callable[[Batch], Signal]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step made of these microbatches."""
    terms = {**learner.output_terms, **learner.hidden_terms}
    counts = {kind: sum(batch.counts[kind] for batch in batches) for kind in ("scored", "represented")}
    scales = {key: term.weight / counts[term.count] for key, term in terms.items()}
    learner.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = learner(batch, score(batch), scales)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in learner.named_parameters()}


def _assert_same(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]], tolerance: float = 2e-6) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a[1].keys() == b[1].keys()
    largest = max(grad.abs().max() for grad in a[1].values())
    for name in a[1]:
        assert (a[1][name] - b[1][name]).abs().max() <= tolerance * max(largest, 1.0), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_accumulation_padding_packing_and_chunks_do_not_matter(
    objective: str, tied: bool, together: Callable[..., Batch], samples: list[Sample], tokenizer: Any, teacher_dir: Path
) -> None:
    score = _score(ModelTeacher(model=str(teacher_dir)), tokenizer, objective)
    learner = _learner(objective, tokenizer, tied)
    whole = _run(learner, [together(samples)], score)
    assert whole[0] > 0 and any(grad.any() for grad in whole[1].values())
    one_by_one = _run(learner, [pad([sample], 2) for sample in samples], score)
    _assert_same(whole, one_by_one)
    learner.chunks = 7
    _assert_same(whole, _run(learner, [pad(samples, 0)], score))
    uneven_with_empty = _run(learner, [together(samples[:4]), pad([], 2), together(samples[4:])], score)
    _assert_same(whole, uneven_with_empty)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_fused_equals_plain(
    objective: str, tied: bool, together: Callable[..., Batch], samples: list[Sample], tokenizer: Any, teacher_dir: Path
) -> None:
    score = _score(ModelTeacher(model=str(teacher_dir)), tokenizer, objective)
    batches = [together(samples)]
    _assert_same(
        _run(_learner(objective, tokenizer, tied), batches, score), _run(_learner(objective, tokenizer, tied, fused=False), batches, score)
    )


@pytest.mark.parametrize("objective", ["everything", "hidden"])
def test_gradient_checkpointing_does_not_matter(
    objective: str, together: Callable[..., Batch], samples: list[Sample], tokenizer: Any, teacher_dir: Path
) -> None:
    score = _score(ModelTeacher(model=str(teacher_dir)), tokenizer, objective)
    plain, checkpointed = _learner(objective, tokenizer), _learner(objective, tokenizer)
    recompute_activations(checkpointed.student)
    _assert_same(_run(plain, [together(samples)], score), _run(checkpointed, [together(samples)], score))


@pytest.mark.parametrize("is_empty", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_parameter_gets_a_gradient(
    objective: str, fused: bool, tied: bool, is_empty: bool, samples: list[Sample], tokenizer: Any, teacher_dir: Path
) -> None:
    """A wrapper waits for each of them: also where the objective skips the head or the last blocks, and in an empty microbatch."""
    learner = _learner(objective, tokenizer, tied=tied, fused=fused)
    batch = pad([] if is_empty else samples[:2], 0)
    scales = dict.fromkeys([*learner.output_terms, *learner.hidden_terms], 1.0)
    loss, _ = learner(batch, _score(ModelTeacher(model=str(teacher_dir)), tokenizer, objective)(batch), scales)
    loss.backward()
    assert [name for name, parameter in learner.named_parameters() if parameter.grad is None] == []
    assert bool(loss) != is_empty


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_per_term_losses_sum_to_the_loss(
    objective: str, together: Callable[..., Batch], samples: list[Sample], tokenizer: Any, teacher_dir: Path
) -> None:
    score = _score(ModelTeacher(model=str(teacher_dir)), tokenizer, objective)
    learner, batch = _learner(objective, tokenizer), together(samples)
    scales = dict.fromkeys(active(OBJECTIVES[objective]), 0.01)
    losses, _ = learner(batch, score(batch), scales, per_term=True)
    assert set(losses) == set(active(OBJECTIVES[objective]))
    total: dict[str, Tensor] = {}
    for loss in losses.values():
        learner.zero_grad()
        loss.backward(retain_graph=True)
        for name, parameter in learner.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad.clone()
    learner.zero_grad()
    loss, _ = learner(batch, score(batch), scales)
    loss.backward()
    assert loss.item() == pytest.approx(sum(losses.values()).item(), rel=1e-5)
    for name, grad in total.items():
        torch.testing.assert_close(grad, dict(learner.named_parameters())[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["logits", "reverse_kl", "hidden", "everything"])
def test_store_equals_the_live_teacher(
    objective: str,
    together: Callable[..., Batch],
    data: Path,
    samples: list[Sample],
    tokenizer: Any,
    teacher_dir: Path,
    tmp_path: Path,
) -> None:
    """Bit for bit on the batches of the capture, 1e-5 on others."""
    teacher = {"type": "model", "model": str(teacher_dir)}
    source = {"type": "dataset", "data": str(data), "max_length": 64}
    capture(
        {
            "teacher": teacher,
            "source": source,
            "capture": {"path": str(tmp_path / "s"), "batch_size": 3, "layers": [1, 3], "samples_per_shard": 3},
        }
    )
    online = _score(ModelTeacher(model=str(teacher_dir)), tokenizer, objective)
    offline = _score(StoreTeacher(path=str(tmp_path / "s")), tokenizer, objective)
    captured = sorted(samples, key=lambda sample: (len(sample.ids), sample.sample_id))
    same = [pad(captured[i : i + 3], 2) for i in range(0, len(captured), 3)]
    for batch in same:
        ours, theirs = offline(batch), online(batch)
        if theirs.output is not None:
            assert torch.equal(ours.output, theirs.output)
            assert torch.equal(ours.teacher_head(ours.output), theirs.teacher_head(theirs.output))
        assert ours.hidden.keys() == theirs.hidden.keys()
        assert all(torch.equal(ours.hidden[layer], theirs.hidden[layer]) for layer in ours.hidden)
    learner = _learner(objective, tokenizer)
    a, b = _run(learner, same, online), _run(learner, same, offline)
    assert a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in a[1])
    others = [together(samples[:4]), together(samples[4:])]
    _assert_same(_run(learner, others, online), _run(learner, others, offline), tolerance=1e-5)


@pytest.mark.parametrize(
    ("term", "exactly"),
    [
        (Logits(), 1e-6),
        (Logits(divergence="reverse_kl"), 1e-6),
        (Logits(temperature=3.0), 1e-6),
        (Hidden(), 0.0),
        (Hidden(measure="cosine"), 1e-6),
    ],
)
def test_student_equal_to_its_teacher_has_no_loss_and_no_gradient(
    term: Term, exactly: float, together: Callable[..., Batch], samples: list[Sample], tokenizer: Any, model_dir: Path
) -> None:
    terms = active([term])
    student = tiny_model()
    learner = Learner(student, terms, len(tokenizer), teacher_layers=4, teacher_width=32)
    scorer = ModelTeacher(model=str(model_dir)).open(tokenizer, needs_of(terms, 4, 4))
    loss, grads = _run(learner, [together(samples)], scorer.score)
    assert abs(loss) <= exactly
    assert all(grad.abs().max() <= exactly for grad in grads.values())


def test_unscored_positions_get_exactly_zero_gradient(together: Callable[..., Batch], samples: list[Sample], tokenizer: Any) -> None:
    """The head's rows are the scored tokens only: the last hidden state elsewhere gets nothing."""
    learner, batch = _learner("ce", tokenizer), together(samples)
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = learner.student.model.norm.register_forward_hook(keep)
    loss, _ = learner(batch, Signal(), {"ce": 1.0})
    loss.backward()
    handle.remove()
    grad = kept[0].grad.flatten(0, 1)
    unscored = torch.ones(grad.shape[0], dtype=torch.bool)
    unscored[batch.scored] = False
    assert not grad[unscored].any() and grad[batch.scored].abs().sum(-1).min() > 0


def test_padded_rows_of_the_vocabulary_get_no_gradient(samples: list[Sample], tokenizer: Any) -> None:
    learner = _learner("ce", tokenizer, tied=False)
    _, grads = _run(learner, [pad(samples, 2)], lambda batch: Signal())
    assert not grads["student.lm_head.weight"][len(tokenizer) :].any()
    assert grads["student.lm_head.weight"][: len(tokenizer)].any()


def test_padding_content_does_not_matter(together: Callable[..., Batch], samples: list[Sample], tokenizer: Any) -> None:
    learner = _learner("ce", tokenizer)
    batch = together(samples)
    other = replace(batch, input_ids=torch.where(batch.document_ids < 0, torch.full_like(batch.input_ids, 7), batch.input_ids))
    assert not torch.equal(batch.input_ids, other.input_ids)
    a, b = _run(learner, [batch], lambda batch: Signal()), _run(learner, [other], lambda batch: Signal())
    assert a[0] == b[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
@pytest.mark.parametrize("pack_length", [None, 20, 64])
def test_ranks_share_a_step_evenly_and_completely(
    world_size: int, micro_batch_size: int, pack_length: int | None, samples: list[Sample]
) -> None:
    shares = [microbatches(samples, micro_batch_size, rank, world_size, 2, pack_length) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    scored = sum(batch.counts["scored"] for share in shares for batch in share)
    assert scored == sum(sample.num_scored for sample in samples)
    found = sorted(int(key) for share in shares for batch in share for key in batch.sample_ids[batch.offsets == 0])
    assert found == sorted(sample.sample_id for sample in samples)


def test_needs_are_what_the_terms_ask_for() -> None:
    assert needs_of(active(OBJECTIVES["ce"]), 2, 4) == Needs()
    assert needs_of(active(OBJECTIVES["everything"]), 2, 4) == Needs(True, frozenset({1, 3}))
