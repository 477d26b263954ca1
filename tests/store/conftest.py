"""One capture per file of tests. `from captures import ...` works for the tests of this folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from captures import LAYERS, ROWS

import limbeck
from helpers import write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", ROWS)


@pytest.fixture(scope="module")
def teacher_dir(make_model_dir):
    return make_model_dir(layers=4, width=48, seed=5)


@pytest.fixture(scope="module")
def base(data, teacher_dir):
    """A recipe that captures; tests change a copy of it."""
    return {
        "teacher": {"type": "model", "model": str(teacher_dir)},
        "source": {"type": "dataset", "data": str(data), "max_length": 64},
        "capture": {"layers": list(LAYERS), "samples_per_shard": 2, "batch_size": 2},
    }


@pytest.fixture(scope="module")
def captured(base, tmp_path_factory):
    """A whole capture. Read-only."""
    path = tmp_path_factory.mktemp("captures") / "store"
    limbeck.capture(base, [f"capture.path={path}"])
    return path


@pytest.fixture
def store(captured, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(captured, tmp_path / "store"))
