"""A real Llama that is a bigram model: what comes next depends on the last token alone, by a table that a test can read by hand."""

from __future__ import annotations

from typing import Any

import torch

from helpers import tiny_model


def bigram_model(table: torch.Tensor) -> Any:
    """`table[a, b]` is the logit of token b after token a, for the V tokens of the test's vocabulary.

    The blocks add nothing to the residual stream, the embeddings are one-hot and the head holds the table.
    """
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


def random_table(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Logits drawn at random."""
    return 2 * torch.randn(num_tokens, num_tokens, generator=torch.Generator().manual_seed(seed))
