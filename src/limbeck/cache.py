"""Where fetched models and data live, and how their names resolve: a path, then Limbeck's cache, then (for models) the hub.

Fetching is `limbeck.assets`; this module only looks.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from limbeck.errors import DataError, ModelError, nearest

MAX_HEADER = 100_000_000
"""Bytes of a safetensors header, as its own library bounds them."""


def cache_dir() -> Path:
    """`$LIMBECK_CACHE`, else `limbeck` in the user's cache folder."""
    if chosen := os.environ.get("LIMBECK_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limbeck"


def cached_models() -> list[str]:
    """Names (`owner/model`) of the models in the cache."""
    root = cache_dir() / "models"
    return sorted(str(config.parent.relative_to(root)) for config in root.glob("*/*/config.json"))


def cached_data() -> list[str]:
    """Names (`owner/set`) of the data sets in the cache."""
    root = cache_dir() / "data"
    return sorted(str(file.relative_to(root).with_suffix("")) for file in root.glob("*/*.jsonl"))


def resolve_model(name: str) -> str:
    """A local folder for `name` where there is one, else `name` itself, to be looked for on the hub by transformers."""
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # os.path, here and below: Path raises for a name that is too long
        if not (path / "config.json").is_file():
            hint = f"; did you mean {name.rstrip('/') + '/student'!r}?" if (path / "student" / "config.json").is_file() else ""
            raise ModelError(f"model {name!r}: the folder has no config.json; expected a model saved by save_pretrained{hint}")
        return str(path)
    cached = cache_dir() / "models" / name
    if os.path.isfile(cached / "config.json"):
        return str(cached)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        siblings = [str(config.parent) for config in path.parent.glob("*/config.json")] if os.path.isdir(path.parent) else []
        hint = nearest(name, cached_models() + siblings)
        raise ModelError(f"model {name!r}: no such folder, and not a hub name of the form owner/model{hint}")
    return name


def resolve_tokenizer(name: str) -> str:
    """As `resolve_model`; a folder may hold a tokenizer alone."""
    path = Path(os.path.expanduser(name))
    return str(path) if os.path.isfile(path / "tokenizer_config.json") else resolve_model(name)


def model_config(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """The config.json of a model as plain JSON, without torch; None where it is neither local nor in the hub's cache."""
    path = model_file(name, "config.json", revision)
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: found {type(config).__name__}, expected a mapping")
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    for key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if key in config and (type(config[key]) is not int or config[key] < 1):
            raise ModelError(f"{path}: {key}: found {config[key]!r}, expected a number from 1")
    return dict(config)


def weight_shapes(name: str, revision: str | None = None) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of a model's weights, from the headers of its files; None where these are neither local nor in the hub's cache."""
    found = _weights(name, revision)
    return {key: shape for key, (_, shape) in found.items()} if found is not None else None


def weight_file(name: str, weight: str, revision: str | None = None) -> Path | None:
    """The file that holds one of a model's weights; None where it is neither local nor in the hub's cache."""
    return (_weights(name, revision) or {}).get(weight, (None,))[0]


def _weights(name: str, revision: str | None) -> dict[str, tuple[Path, tuple[int, ...]]] | None:
    files = [model_file(name, "model.safetensors", revision)]
    index = model_file(name, "model.safetensors.index.json", revision)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    try:
        if index is not None:
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [model_file(name, part, revision) for part in sorted(set(parts))]
        for file in files:
            if file is None or not file.is_file():
                return None
            with open(file, "rb") as stream:  # 8 bytes of length, then JSON by name
                header = json.loads(stream.read(min(int.from_bytes(stream.read(8), "little"), MAX_HEADER)))
            found.update({key: (file, tuple(value["shape"])) for key, value in header.items() if key != "__metadata__"})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"model {name!r}: its weights are not readable as safetensors: {error}") from None
    return found


def model_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Where a file of a model lies; None where the model is neither local nor in the hub's cache, or lacks it there."""
    resolved = resolve_model(name)
    if os.path.isdir(resolved):
        return Path(resolved) / file if os.path.exists(Path(resolved) / file) else None
    from huggingface_hub import try_to_load_from_cache

    try:
        hit = try_to_load_from_cache(resolved, file, revision=revision)
    except ValueError as error:
        raise ModelError(f"model {name!r}: no such folder, and not a hub name: {error}") from None
    return Path(hit) if isinstance(hit, str) else None


def resolve_data(name: str) -> Path:
    """The JSON-lines file that `name` means: a path, a data set in the cache, or one shipped with Limbeck."""
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return path
    shipped_dir = Path(__file__).parent / "data"
    for candidate in (cache_dir() / "data" / f"{name}.jsonl", shipped_dir / f"{name}.jsonl"):
        if os.path.isfile(candidate):
            return candidate
    shipped = [str(file.relative_to(shipped_dir).with_suffix("")) for file in shipped_dir.glob("**/*.jsonl")]
    siblings = [str(file) for file in path.parent.glob("*.jsonl")] if os.path.isdir(path.parent) else []
    known = sorted({*cached_data(), *shipped})
    what = "a folder, expected a file" if name and os.path.isdir(path) else "no such file or data set"
    hint = (
        nearest(name, known + siblings)
        or f"; known data sets: {', '.join(known) or 'none'} (`limbeck assets list` shows what can be fetched)"
    )
    raise DataError(f"data {name!r}: {what}{hint}")
