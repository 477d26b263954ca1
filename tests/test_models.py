"""Backbone, blocks and head of several architectures; depth pruning; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from helpers import tiny_model
from limbeck.errors import LimbeckError, ModelError
from limbeck.models import backbone, blocks, forward, head, load_model, verify_head, weights_hash
from limbeck.student import Student, build, prune

SMALL = {
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
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 8},
    "Gemma3Text": {"final_logit_softcapping": 3.0, "sliding_window": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Mistral": {},
    "Phi3": {},
    "Olmo2": {},
}


def _config(name: str) -> Any:
    return getattr(transformers, f"{name}Config")(**(SMALL | ARCHITECTURES[name]))


def _model(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_config(name)).eval()
        for parameter in model.parameters():  # large logits, so that a missing cap or factor shows
            parameter.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("name", ["GPT2", *sorted(ARCHITECTURES)])
def test_head_of_the_backbone_gives_the_models_logits(name: str) -> None:
    model = _gpt2() if name == "GPT2" else _model(name)
    verify_head(model)
    assert len(blocks(model)) == model.config.num_hidden_layers
    ids = torch.tensor([[5, 9, 3, 7]])
    last, states = forward(model, ids, torch.arange(4)[None], [0, 3])
    torch.testing.assert_close(head(model)(last[0]), model(input_ids=ids, use_cache=False).logits[0], rtol=1e-4, atol=1e-4)
    expected = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0], expected[1])
    assert states[3].shape == last.shape


def _gpt2() -> Any:
    return AutoModelForCausalLM.from_config(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64)).eval()


@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_model_without_sdpa_is_loaded_all_the_same(name: str, tmp_path: Path) -> None:
    extra = {"num_local_experts": 4, "num_experts_per_tok": 2} if name == "GptOss" else {}
    AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**(SMALL | extra))).save_pretrained(tmp_path)
    verify_head(load_model(str(tmp_path)))


@pytest.mark.parametrize("break_by", ["cap", "factor"])
def test_head_that_is_not_ours_is_refused(break_by: str) -> None:
    model = _model("Gemma2" if break_by == "cap" else "Cohere")
    if break_by == "cap":
        ids = torch.arange(1, 9)[None]
        before = model(input_ids=ids).logits
        model.config.final_logit_softcapping = None
        original, cap = model.forward, 5.0

        def capped(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            output.logits = cap * torch.tanh(output.logits / cap)
            return output

        model.forward = capped
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-4)
    else:
        model.config.logit_scale = 0.5
    with pytest.raises(ModelError, match="not supported"):
        verify_head(model)


@pytest.mark.parametrize("name", ["GPT2", *sorted(ARCHITECTURES)])
def test_pruned_model_is_the_kept_blocks_and_survives_saving(name: str, tmp_path: Path) -> None:
    model = _gpt2() if name == "GPT2" else _model(name)
    kept = [0, 1, 3]
    weights = [{key: value.clone() for key, value in blocks(model)[i].state_dict().items()} for i in kept]
    types = list(getattr(model.config, "layer_types", None) or [])
    prune(model, kept)
    assert model.config.num_hidden_layers == 3
    if types:
        assert model.config.layer_types == [types[i] for i in kept]
    for block, expected in zip(blocks(model), weights, strict=True):
        assert all(torch.equal(value, expected[key]) for key, value in block.state_dict().items())
    ids = torch.tensor([[5, 9, 3, 7, 2, 8]])
    expected_logits = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected_logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected_logits)
    generated = again.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > ids.shape[1]


def test_student_is_built_pruned_and_reads_its_shape_without_weights(model_dir: Path) -> None:
    spec = Student(model=str(model_dir), num_layers=2)
    assert spec.shape() == (2, 32) and spec.kept(4) == [0, 3]
    student = build(spec)
    assert len(blocks(student)) == 2 and student.dtype == torch.float32
    assert weights_hash(dict(student.named_parameters())) == weights_hash(dict(build(spec).named_parameters()))
    assert weights_hash(dict(student.named_parameters())) != weights_hash(dict(tiny_model().named_parameters()))


@pytest.mark.parametrize(("total", "wanted", "kept"), [(30, 1, [29]), (4, 2, [0, 3]), (5, 3, [0, 2, 4]), (6, 6, [0, 1, 2, 3, 4, 5])])
def test_even_pruning_keeps_first_and_last(total: int, wanted: int, kept: list[int]) -> None:
    assert Student(model="x/y", num_layers=wanted).kept(total) == kept


def test_pruning_that_cannot_be_is_refused(model_dir: Path) -> None:
    with pytest.raises(LimbeckError, match=r"keep_layers: found block 4, expected 0 to 3"):
        build(Student(model=str(model_dir), keep_layers=[0, 4]))
    with pytest.raises(LimbeckError, match=r"num_layers: found 5, expected at most 4"):
        build(Student(model=str(model_dir), num_layers=5))


def test_backbone_of_something_else_is_refused() -> None:
    with pytest.raises(ModelError, match="expected a causal language model"):
        backbone(transformers.BertModel(transformers.BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=20)))


def test_model_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_model(str(tmp_path / "nothing"))
