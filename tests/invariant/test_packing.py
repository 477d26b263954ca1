"""Documents that share a row are as good as alone: loss and every gradient, architecture by architecture; and who cannot is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import limbeck
import limbeck.learner
from limbeck import models
from limbeck.errors import ModelError
from limbeck.learner import Learner
from limbeck.models import verify_packing
from limbeck.objectives import CrossEntropy, Hidden
from limbeck.teachers.model import ModelScorer
from limbeck.tokens.pack import pack
from limbeck.tokens.pad import collate, pad
from limbeck.tokens.sample import Sample

WINDOW = 8
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KEPT_APART: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "Qwen3": {},
    "Gemma3Text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Mistral": {"sliding_window": WINDOW},
    "Phi3": {},
    "Olmo2": {},
    "SmolLM3": {},
}
MIXED: dict[str, dict[str, Any]] = {
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Qwen3Next": {},
}


def model_of(name: str, settings: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**(SIZES | settings))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        for parameter in model.parameters():  # large, so that a token which sees too much shows
            parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    random = np.random.default_rng(0)
    lengths = (3, 2 * WINDOW + 1, 1, WINDOW, 3 * WINDOW, WINDOW + 1, 2)
    return [
        Sample(
            sample_id=number, ids=random.integers(3, 64, length), is_target=np.array([0, *random.integers(0, 2, length - 1)], dtype=bool)
        )
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("name", sorted(KEPT_APART))
def test_packed_equals_one_by_one(name: str, samples: list[Sample]) -> None:
    """Three rows of up to 40 tokens, in two microbatches, against seven of one document each."""
    teacher = model_of(name, KEPT_APART[name])
    scorer = ModelScorer("teacher", teacher, models.head(teacher), 4, limbeck.objectives.Needs(layers=frozenset({0, 3})))
    learner = Learner(model_of(name, KEPT_APART[name]), {"ce": CrossEntropy(), "hidden": Hidden(pairs=[(0, 3), (3, 0)])}, 64, 4, 32)
    rows = pack(samples, 40)
    assert len(rows) == 2 < max(map(len, rows))
    whole, packed = [pad([sample], 0) for sample in samples], [collate(rows, 0)]
    results = []
    for batches in (whole, packed, [collate(rows[:1], 0), collate(rows[1:], 0)]):
        learner.zero_grad()
        total = 0.0
        for batch in batches:
            loss, _ = learner(batch, scorer.score(batch), {"ce": 1.0, "hidden": 1.0})
            loss.backward()
            total += loss.item()
        results.append((total, {key: value.grad.clone() for key, value in learner.named_parameters()}))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for key, grad in grads.items():
            expected = results[0][1][key]
            assert (grad - expected).abs().max() <= 1e-5 * max(expected.abs().max().item(), 1.0), key


@pytest.mark.parametrize("name", sorted(KEPT_APART))
def test_architectures_that_keep_documents_apart_are_accepted(name: str) -> None:
    verify_packing(model_of(name, KEPT_APART[name]))
    verify_packing(model_of(name, KEPT_APART[name]).to(torch.bfloat16))


@pytest.mark.parametrize("name", sorted(MIXED))
def test_architectures_that_mix_documents_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=rf"{name}ForCausalLM: its hidden states change by .* train.pack_length"):
        verify_packing(model_of(name, MIXED[name]))


def test_the_default_cache_mixes_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap that `forward` avoids: with a cache, transformers makes no mask from position ids."""
    model = model_of("Llama", {})

    def with_cache(model: Any, ids: Any, positions: Any, layers: Any = ()) -> Any:
        return models.backbone(model)(input_ids=ids, position_ids=positions).last_hidden_state, {}

    monkeypatch.setattr(models, "forward", with_cache)
    with pytest.raises(ModelError, match="so they see each other"):
        verify_packing(model)


def test_packing_is_verified_of_student_and_teacher_where_it_is_asked_for(
    make_model_dir: Any, write_jsonl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(models, "verify_packing", lambda model: asked.append(len(models.blocks(model))))
    monkeypatch.setattr("limbeck.trainer.verify_packing", lambda model: asked.append(len(models.blocks(model))))
    recipe: dict[str, Any] = {
        "student": {"model": str(make_model_dir(layers=2))},
        "teacher": {"type": "model", "model": str(make_model_dir(layers=3))},
        "source": {"type": "dataset", "data": str(write_jsonl([{"prompt": "The weather", "completion": " in Paris"}] * 3))},
        "objective": [{"type": "logits"}],
        "train": {"steps": 1, "batch_size": 3},
    }
    shapes: list[tuple[int, ...]] = []
    forward = limbeck.learner.forward
    monkeypatch.setattr("limbeck.learner.forward", lambda model, ids, *rest: shapes.append(tuple(ids.shape)) or forward(model, ids, *rest))
    limbeck.train(recipe, tmp_path / "plain")
    assert asked == [] and len(shapes) == 3
    length = shapes[0][1]
    limbeck.train(recipe, tmp_path / "packed", [f"train.pack_length={2 * length + 1}"])
    assert asked == [2, 3] and shapes[3:] == [(1, 2 * length), (1, length)]
