"""GGUF to a Hugging Face folder (llama and qwen2 architectures, byte-level BPE tokenizers), converted once and then loaded as safetensors.

transformers reads GGUF too, but keeps the weights packed (not trainable), takes five times as long, and drops SmolLM2's digit splitting.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from limbeck.errors import ModelError

_OUTSIDE_BLOCKS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# the values of tokenizer.ggml.token_type that are used here; 5 marks the rows that only pad the vocabulary
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def convert(file: Path, folder: Path, *, tie_embeddings: bool = False) -> None:
    """Write config, bfloat16 weights and tokenizer of a GGUF file to `folder`, for any HF tool to load.

    With `tie_embeddings` the input embeddings are replaced by the output matrix: of the two copies it is the more finely quantised.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    try:
        reader = GGUFReader(file)
    except ValueError as error:
        raise ModelError(f"{file.name}: not readable as GGUF: {error}") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in ("llama", "qwen2"):
        raise ModelError(f"{file.name}: found architecture {architecture!r}, expected llama or qwen2")
    weights = _weights(reader, fields, file.name)
    if tie_embeddings and "lm_head.weight" in weights:
        weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
    config = _config(fields, is_tied="lm_head.weight" not in weights)

    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors leaves it unreadable to others
    _tokenizer(fields, file.name).save_pretrained(folder)


def _weights(reader: Any, fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The tensors, dequantised, under their HF names."""
    import torch
    from gguf.quants import dequantize

    architecture = fields["general.architecture"]
    heads = {
        "attn_q": fields[f"{architecture}.attention.head_count"],
        "attn_k": fields[f"{architecture}.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        _, *block = tensor.name.split(".", 3) if tensor.name.startswith("blk.") else ("",)
        if block:
            layer, part, suffix = block
            if architecture == "llama" and part in heads:
                values = _split_halves(values, heads[part])
            name = f"model.layers.{layer}.{_IN_BLOCK[part]}.{suffix}" if part in _IN_BLOCK else None
        else:
            name = _OUTSIDE_BLOCKS.get(tensor.name)
        if name is None:
            raise ModelError(f"{where}: found tensor {tensor.name!r}, which no {architecture} model of transformers has")
        weights[name] = torch.tensor(values, dtype=torch.bfloat16)
    return weights


def _split_halves(weight: Any, num_heads: int) -> Any:
    """Rows of a llama q or k projection from GGUF's interleaved order to transformers' two halves per head (both serve RoPE)."""
    return weight.reshape(num_heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _config(fields: dict[str, Any], is_tied: bool) -> Any:
    from transformers import AutoConfig

    architecture = fields["general.architecture"]

    def of(key: str) -> Any:
        return fields[f"{architecture}.{key}"]

    return AutoConfig.for_model(
        architecture,
        architectures=[{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[architecture]],
        dtype="bfloat16",
        hidden_size=of("embedding_length"),
        num_hidden_layers=of("block_count"),
        intermediate_size=of("feed_forward_length"),
        num_attention_heads=of("attention.head_count"),
        num_key_value_heads=of("attention.head_count_kv"),
        max_position_embeddings=of("context_length"),
        rms_norm_eps=round(of("attention.layer_norm_rms_epsilon"), 9),  # float32 in the file: 9.99999974e-06
        rope_parameters={"rope_type": "default", "rope_theta": of("rope.freq_base")},
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        tie_word_embeddings=is_tied,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )


def _tokenizer(fields: dict[str, Any], where: str) -> Any:
    """The byte-level BPE tokenizer, pre-tokenised as `tokenizer.ggml.pre` names it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    num_real = 1 + max(i for i, kind in enumerate(kinds) if kind in (_NORMAL, _CONTROL, _USER_DEFINED))
    vocabulary = {token: i for i, token in enumerate(tokens[:num_real])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = fields.get("tokenizer.ggml.pre")
    if split == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        raise ModelError(f"{where}: found pre-tokenizer {split!r}, expected smollm or qwen2")
    tokenizer.decoder = decoders.ByteLevel()
    for kind in (_CONTROL, _USER_DEFINED):
        is_special = kind == _CONTROL
        added = [AddedToken(tokens[i], normalized=False, special=is_special) for i in range(num_real) if kinds[i] == kind]
        tokenizer.add_special_tokens(added) if is_special else tokenizer.add_tokens(added)

    def token(role: str) -> str | None:
        identity = fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if identity is None else tokens[identity]

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token("bos"),
        eos_token=token("eos"),
        pad_token=token("padding"),
        unk_token=token("unknown"),
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = fields.get("tokenizer.chat_template")
    return wrapped
