"""Has a model learned the markers that the data teach? Rows of a head that were never trained all point in one direction, so that the
model cannot tell their tokens apart (2405.05417): adapters leave them so, and a teacher has nothing to say of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from limbeck.adapters import block_of
from limbeck.cache import model_config, weight_file, weight_shapes
from limbeck.doctor.finding import Finding
from limbeck.errors import LimbeckError, ModelError
from limbeck.tokens.sample import Sample

ALIKE = 0.9999
"""Cosine of two rows of a head that were never told apart. Of markers that training has moved, the highest that was seen is 0.993."""
BLOCK = 8192
"""Rows that are read at a time."""


@dataclass(frozen=True)
class Unlearned:
    """A token, and the id whose row of the head is nearest to its own."""

    token: int
    nearest: int
    cosine: float


def taught(samples: Iterable[Sample], tokenizer: Any) -> Counter[int]:
    """Samples that teach each added token: those that the tokenizer never takes apart, as `<tool_call>` and `<|im_end|>`."""
    import numpy as np

    added = np.fromiter(tokenizer.added_tokens_decoder, dtype=np.int64)
    found: Counter[int] = Counter()
    for sample in samples:
        learned = np.asarray(sample.ids)[np.asarray(sample.is_target)]
        found.update(int(token) for token in np.unique(learned[np.isin(learned, added)]))
    return found


def examine(side: str, model: tuple[str, str | None], taught: Mapping[int, int], tokenizer: Any, consequence: str) -> Iterator[Finding]:
    """The finding of one side, from how many samples teach each marker; none where there are no markers. `consequence` is what it means
    where some are unlearned."""
    if not taught:
        return
    check = f"markers to the {side}"
    try:
        found = unlearned(*model, taught)
    except LimbeckError as error:
        yield Finding(check, "unknown", str(error))
        return
    detail: dict[str, Any] = {"taught": {str(token): count for token, count in taught.items()}}
    if found is None:
        yield Finding(check, "unknown", f"{model[0]}: the rows of its head are not here, or not to be told by their name", detail)
        return
    detail["unlearned"] = [asdict(each) for each in found]
    if not found:
        names = ", ".join(_named(tokenizer, token) for token in sorted(taught))
        yield Finding(check, "ok", f"its head tells {names} from all others", detail)
        return
    listed = ", ".join(f"{_named(tokenizer, each.token)} from {_named(tokenizer, each.nearest)}" for each in found)
    most = max(taught[each.token] for each in found)
    yield Finding(check, "warning", f"its head does not tell {listed}, taught by {most:,} samples: {consequence}", detail)


def unlearned(model: str, revision: str | None, tokens: Iterable[int]) -> list[Unlearned] | None:
    """Those of the tokens whose row of the head is another's too; None where the head is not here, or not to be told by its name."""
    name, rows = head_of(model, revision)
    file = weight_file(model, name, revision) if name else None
    if file is None:
        return None
    try:
        return [found for found in _nearest(file, name, rows, [token for token in tokens if token < rows]) if found.cosine >= ALIKE]
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model {model!r}: {file.name} is not readable: {error}") from None


def head_of(model: str, revision: str | None) -> tuple[str, int]:
    """Name and number of rows of a model's head: the matrix outside of the blocks with a row for each id, of two that which is no
    embedding. An empty name where that is not to be told."""
    rows = (model_config(model, revision) or {}).get("vocab_size")
    shapes = weight_shapes(model, revision) or {}
    whole = [name for name, shape in shapes.items() if rows and len(shape) == 2 and shape[0] == rows and block_of(name) is None]
    heads = [name for name in whole if "head" in name or "embed_out" in name] or whole
    return (heads[0], rows) if len(heads) == 1 and rows else ("", 0)


def _nearest(file: Path, name: str, rows: int, tokens: Sequence[int]) -> Iterator[Unlearned]:
    import torch
    from torch.nn.functional import normalize

    if not tokens:
        return
    with safe_open(str(file), "pt") as weights:
        head = weights.get_slice(name)
        ours = torch.cat([head[token : token + 1] for token in tokens]).float()
        ours, is_zero = normalize(ours), ~ours.any(dim=1)
        best, where = torch.full((len(tokens),), -2.0), torch.zeros(len(tokens), dtype=torch.long)
        for start in range(0, rows, BLOCK):
            block = head[start : start + BLOCK].float()
            cosines = ours @ normalize(block).T
            cosines[is_zero[:, None] & ~block.any(dim=1)] = 1.0  # rows of zeros have no direction, and give one logit
            for i, token in enumerate(tokens):
                if start <= token < start + BLOCK:
                    cosines[i, token - start] = -2.0  # itself
            value, index = cosines.max(dim=1)
            where = torch.where(value > best, index + start, where)
            best = torch.maximum(best, value)
    for token, cosine, nearest in zip(tokens, best.tolist(), where.tolist(), strict=True):
        yield Unlearned(token, nearest, cosine)


def _named(tokenizer: Any, token: int) -> str:
    piece = tokenizer.convert_ids_to_tokens(token)
    return f"the unused id {token}" if piece is None else repr(piece)
