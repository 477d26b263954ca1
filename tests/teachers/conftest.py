"""A served tiny teacher, and the folder of the same model. `from stub import ...` works for the tests of this folder."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if find_spec("httpx") is None or find_spec("tenacity") is None:
    collect_ignore_glob = ["test_*.py"]

from stub import NAME, Stub

import helpers
from limbeck.teachers import client


@pytest.fixture(scope="session")
def teacher(tokenizer):
    """The model that is served, without padded rows."""
    return helpers.tiny_model(seed=3, vocab=len(tokenizer), width=48, initializer_range=0.4)


@pytest.fixture(scope="session")
def teacher_dir(teacher, tokenizer, tmp_path_factory):
    return helpers.save_model(tmp_path_factory.mktemp("teacher"), teacher, tokenizer)


@pytest.fixture
def server(teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    stub = Stub(teacher, len(tokenizer))
    yield stub
    stub.close()


@pytest.fixture
def spec(server, tokenizer_dir):
    """The teacher of a recipe, as a mapping."""
    return {"type": "server", "url": server.url, "served_name": NAME, "tokenizer": str(tokenizer_dir), "k": 8, "timeout_seconds": 1.0}
