"""Where fetched models and data live, and how their names resolve: a path, then Limbeck's cache, then (for models) the hub.

Fetching is `limbeck.assets`; this module only looks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from limbeck.errors import DataError, ModelError, nearest

MAX_HEADER = 100_000_000
"""Bytes of a safetensors header, as its own library bounds them."""
MODEL_FILES = {".safetensors", ".json", ".jinja", ".txt", ".model"}
"""Of a model's folder, what decides what it does: weights, configuration, tokenizer, chat template."""
CONFIGS = {"config.json", "generation_config.json"}


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


def files_hash(names: Sequence[str]) -> str:
    """SHA-256 over the content of data files, wherever they lie."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(_content(resolve_data(name)))
    return digest.hexdigest()


def model_content(name: str) -> str | None:
    """SHA-256 over the files of a model in a folder; None for one that lies elsewhere, which its name and revision tell."""
    folder = Path(os.path.expanduser(name))
    if not os.path.isdir(folder):
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in MODEL_FILES and file.is_file():
            digest.update(file.name.encode() + b"\0" + _content(file))
    return digest.hexdigest()


def _content(file: Path) -> bytes:
    file = file.resolve()
    about = file.stat()
    return _content_once(file, about.st_ino, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=1024)
def _content_once(file: Path, inode: int, size: int, changed: int) -> bytes:
    """SHA-256 of a file that has not changed since: a study asks again for every run that it may have. It does not matter which version
    of transformers wrote a config."""
    if file.name in CONFIGS:
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            config.pop("transformers_version", None)
            return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).digest()
        except (ValueError, AttributeError, RecursionError):  # whoever loads it will say what is wrong
            pass
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
