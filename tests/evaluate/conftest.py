"""A real Llama that is a bigram model: what comes next depends on the last token alone, by a table that a test can read by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers import tiny_model


def build(table: torch.Tensor) -> Any:
    """The blocks add nothing to the residual stream, the embeddings are one-hot and the head holds the table."""
    num_tokens = len(table)
    width = -(-num_tokens // 8) * 8
    model = tiny_model(tied=False, layers=1, width=width, vocab=num_tokens, rms_norm_eps=1e-12)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(num_tokens, width))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :num_tokens] = table.T / width**0.5
    return model


@pytest.fixture(scope="session")
def bigram_model() -> Callable[[torch.Tensor], Any]:
    """`bigram_model(table)`: `table[a, b]` is the logit of token b after token a."""
    return build


@pytest.fixture(scope="session")
def random_table(tokenizer: Any) -> torch.Tensor:
    """Logits `[V, V]` drawn at random, V the tokens of the shared tokenizer."""
    return 2 * torch.randn(len(tokenizer), len(tokenizer), generator=torch.Generator().manual_seed(0))
