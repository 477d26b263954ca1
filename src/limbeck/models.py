"""HF causal language models: loading and saving, and the three parts that a training step needs (backbone, blocks, head).

Nothing here knows of losses or data. Weights are loaded from safetensors only; code from a model's repository is never run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.cache import cached_models, resolve_model, resolve_tokenizer
from limbeck.errors import ModelError, RunError, nearest
from limbeck.log import warn
from limbeck.objectives.head import Head

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    name: str, dtype: str = "float32", revision: str | None = None, device: str = "cpu", load_in: Literal["8bit", "4bit"] | None = None
) -> Any:
    """A causal LM by folder, cached name or hub name, in eval mode; with `load_in`, its linear layers keep that many bits per weight."""
    from transformers import AutoModelForCausalLM

    source = resolve_model(name)
    settings: dict[str, Any] = {"dtype": DTYPES[dtype], "revision": revision, "use_safetensors": True, "trust_remote_code": False}
    if load_in is not None:
        settings |= {"quantization_config": _in_bits(load_in, DTYPES[dtype]), "device_map": {"": device}}
    with _named(name, "model"), _quiet():
        model = AutoModelForCausalLM.from_pretrained(source, **settings)
    return model.eval() if load_in is not None else model.eval().to(device)


def load_architecture(name: str, revision: str | None = None, dtype: str = "float32") -> Any:
    """A causal LM as its config.json describes it, on the device that holds no numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _named(name, "architecture of model"), _quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(resolve_model(name), revision=revision, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False)


def _in_bits(load_in: Literal["8bit", "4bit"], dtype: torch.dtype) -> Any:
    """bitsandbytes' settings: LLM.int8 (2208.07339) without columns in full precision, whose choice would depend on the other texts of a
    batch; NF4 with double quantisation (2305.14314)."""
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every layer of every forward that 8 bits are computed in float16
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def fetch_config(name: str, revision: str | None = None) -> None:
    """Bring the config.json of a hub model into the hub's cache, where `limbeck.cache.model_config` finds it; local models have theirs."""
    from transformers import AutoConfig

    with _named(name, "config of model"), _quiet():
        AutoConfig.from_pretrained(resolve_model(name), revision=revision, trust_remote_code=False)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer beside a model, or in a folder of its own."""
    from transformers import AutoTokenizer

    source = resolve_tokenizer(name)
    with _named(name, "tokenizer"), _quiet():
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)


def save_model(model: Any, tokenizer: Any, path: Path) -> None:
    """An HF folder that `AutoModelForCausalLM.from_pretrained` and `pipeline` load where Limbeck is not installed."""
    from safetensors import SafetensorError

    try:
        with _quiet():
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: the model could not be written ({error})") from error


def recompute_activations(model: Any) -> None:
    """Gradient checkpointing in every block: activations are made again in backward instead of being kept."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its name in older releases of transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values of tensors, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().float().contiguous().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def backbone(model: Any) -> nn.Module:
    """The part of a causal LM that ends in the last hidden state (after the final norm)."""
    decoder = model.get_decoder()
    if decoder is None or decoder is model:  # as GPT-2 says in transformers 4
        decoder = model.base_model
    if decoder is model:
        raise ModelError(f"{type(model).__name__}: found no decoder below it, expected a causal language model of transformers")
    return decoder  # type: ignore[no-any-return]


def blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks in order: the one ModuleList of the backbone whose length the config states."""
    found = [(name, child) for name, child in backbone(model).named_children() if isinstance(child, nn.ModuleList)]
    matching = [(name, child) for name, child in found if len(child) == model.config.get_text_config().num_hidden_layers]
    if len(matching) != 1:
        raise ModelError(
            f"{type(model).__name__}: found block lists {[(name, len(child)) for name, child in found]}, "
            f"expected one of length {model.config.get_text_config().num_hidden_layers}"
        )
    return matching[0][1]


def forward(model: Any, batch_ids: Tensor, position_ids: Tensor, layers: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
    """Last hidden state `[B, T, D]` and the residual stream after the given blocks, each `[B, T, D]`.

    No cache: with one, documents that only position ids keep apart would see each other. States are taken by hooks, so that the
    unmapped ones are not kept.
    """
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks(model)[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        output = backbone(model)(input_ids=batch_ids, position_ids=position_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return output.last_hidden_state, kept


def check_size(model: Any, num_tokens: int, longest: int) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings, and sequences that its table of positions does not reach."""
    rows = model.get_input_embeddings().weight.shape[0]
    if num_tokens > rows:
        raise ModelError(f"{type(model).__name__}: found {rows} embeddings, expected one for each of the tokenizer's {num_tokens} tokens")
    config = model.config.get_text_config()
    reach = getattr(config, "max_position_embeddings", None)
    if reach is None or longest <= reach:
        return
    message = (
        f"{type(model).__name__}: found a sequence of {longest} tokens, the model was made for {reach}; set max_length to at most {reach}"
    )
    if getattr(config, "rope_parameters", None) is None:
        raise ModelError(message)
    warn(message)  # rotary positions go on, with a quality that nobody promises


def head(model: Any) -> Head:
    """The output head of a causal LM, with its factor and soft cap. Untested heads are refused by `verify_head`."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(model).__name__}: found no output head, expected a causal language model")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) * float(getattr(config, "lm_head_multiplier", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale /= float(divisor)
    return Head(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def verify_head(model: Any) -> None:
    """Compare `head(model)` on the backbone's output with the model's own logits, once at load; refuse a mismatch."""
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(8, device=device)[None]
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    found = head(model)(forward(model, ids, positions)[0].flatten(0, 1))
    if not expected.isfinite().all():
        raise ModelError(f"{type(model).__name__}: its logits are not finite, so its weights are broken")
    difference = (found - expected.flatten(0, 1)).abs().max().item()
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
    if not difference <= tolerance * max(expected.abs().max().item(), 1.0):
        raise ModelError(
            f"{type(model).__name__}: its logits differ by {difference:.3g} from its head applied to its last hidden state; "
            "expected a linear head with an optional factor and soft cap. This architecture's head is not supported"
        )


@torch.no_grad()
def verify_packing(model: Any) -> None:
    """Compare documents that share a row with the same ones alone, once at load; refuse a model in which they see each other.

    Attention is kept apart by position ids. State-space, linear-attention and convolution layers know no positions, and a few models
    build their mask in another way: those carry one document into the next.
    """
    parameter = next(model.parameters())
    lengths, vocab_size = (7, 20, 12), model.config.get_text_config().vocab_size
    documents = [torch.arange(i, i + length, device=parameter.device)[None] * 5 % vocab_size for i, length in enumerate(lengths)]
    positions = [torch.arange(length, device=parameter.device)[None] for length in lengths]
    alone = torch.cat([forward(model, *pair)[0] for pair in zip(documents, positions, strict=True)], dim=1).float()
    packed = forward(model, torch.cat(documents, dim=1), torch.cat(positions, dim=1))[0].float()
    difference = ((packed - alone).norm() / alone.norm()).item()
    if not difference <= (1e-3 if parameter.dtype == torch.float32 else 5e-2):
        raise ModelError(
            f"{type(model).__name__}: its hidden states change by {difference:.1%} where documents share a row, so they see each other; "
            "expected an architecture that keeps them apart by position ids. Remove train.pack_length: without it every document has a row"
        )


@contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    """transformers' errors about a missing or broken model, as one message that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        hint = (
            nearest(name, cached_models())
            or "; expected a folder saved by save_pretrained, a name in Limbeck's cache (`limbeck assets list`), or a hub name"
        )
        raise ModelError(f"{what} {name!r} cannot be loaded{hint}\n  cause: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:  # safetensors and hub errors have no common base
        raise ModelError(
            f"{what} {name!r} cannot be loaded\n  cause: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own progress bars and warnings off while a model is read or written."""
    from transformers.utils import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()
