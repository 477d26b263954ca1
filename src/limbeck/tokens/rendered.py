"""Rendered rows kept on disk: a data set is tokenised once per tokenizer and template, whatever length, order or method it is used with.

`rendered/KEY.safetensors` in Limbeck's cache. The key hashes all that a rendering depends on: the rows, the tokenizer, its chat
template, this code and the packages under it. A file that is damaged, or cannot be written, costs time and nothing else. The folder may
be deleted at any time; the files used last are kept, up to `MAX_BYTES`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.cache import cache_dir
from limbeck.log import warn
from limbeck.tokens.sample import Conversation, Rendered

MIN_ROWS = 100
"""Smaller sets render in less time than anyone notices, and would only leave files behind."""
MAX_BYTES = 4 * 2**30
CODE = ("chat.py", "render.py", "rendered.py", "sample.py")


def render_rows(conversations: Sequence[Conversation], tokenizer: Any) -> list[Rendered]:
    """Every conversation in whole, from the cache where it is there."""
    from limbeck.tokens.render import render_whole

    file = _file_for(conversations, tokenizer) if len(conversations) >= MIN_ROWS else None
    if file is not None and (found := _read(file, len(conversations))) is not None:
        return found
    rendered = [render_whole(conversation, tokenizer) for conversation in conversations]
    if file is not None:
        try:
            _write(file, rendered)
        except OSError as error:
            warn(f"{file}: rendered data could not be kept ({error}); it will be rendered again")
    return rendered


def _file_for(conversations: Sequence[Conversation], tokenizer: Any) -> Path | None:
    """Where these rows would be; None for a tokenizer that cannot be told from another one (those written in Python)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = hashlib.sha256()
    for name in CODE:
        digest.update((Path(__file__).parent / name).read_bytes())
    versions = [metadata.version(package) for package in ("transformers", "tokenizers", "jinja2")]
    settings = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map, versions]
    for text in (backend.to_str(), json.dumps(settings, sort_keys=True, default=str), *(each.content for each in conversations)):
        data = text.encode("utf-8")
        digest.update(b"%d:" % len(data) + data)
    return cache_dir() / "rendered" / f"{digest.hexdigest()}.safetensors"


def _read(file: Path, num_rows: int) -> list[Rendered] | None:
    """The rows in a file; None where it is not there or not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as stored:
            tensors = {name: stored.get_tensor(name) for name in ("ids", "is_target", "lengths")}
            about = stored.metadata() or {}
    except (OSError, SafetensorError):
        return None
    ids, is_target, lengths = tensors["ids"], tensors["is_target"], tensors["lengths"]
    if about != _about(file, tensors) or len(lengths) != num_rows:
        return None
    with suppress(OSError):
        os.utime(file)
    ends = lengths.cumsum()[:-1]
    return [Rendered(*row) for row in zip(np.split(ids, ends), np.split(is_target.astype(bool), ends), strict=True)]


def _write(file: Path, rendered: Sequence[Rendered]) -> None:
    """Whole or not at all; several processes may write the same."""
    from safetensors.numpy import save

    tensors = {
        "ids": np.concatenate([row.ids for row in rendered]).astype(np.int32),
        "is_target": np.concatenate([row.is_target for row in rendered]).astype(np.uint8),
        "lengths": np.array([len(row.ids) for row in rendered], dtype=np.int64),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save(tensors, metadata=_about(file, tensors)))
        os.replace(temporary, file)
    finally:
        with suppress(OSError):
            temporary.unlink()
    _forget_oldest(file)


def _about(file: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
    """What a whole file says of itself: safetensors notices a missing end, and no changed byte."""
    content = hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors)))
    return {"key": file.stem, "sha256": content.hexdigest()}


def _forget_oldest(newest: Path) -> None:
    """Remove the files that were not used for longest, until the rest fit."""
    files = []
    for file in newest.parent.glob("*.safetensors"):
        with suppress(OSError):  # another process may have removed it
            files.append((file.stat().st_mtime_ns, file.stat().st_size, file))
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= MAX_BYTES or file == newest:
            continue
        with suppress(OSError):
            file.unlink()
            total -= size
