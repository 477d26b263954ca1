"""A few of the kills of scripts/soak, and that it would notice what is lost."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def soak() -> Any:
    loader = SourceFileLoader("soak", str(ROOT / "scripts" / "soak"))
    spec = spec_from_loader("soak", loader)
    assert spec is not None
    sys.modules["soak"] = module = module_from_spec(spec)  # dataclasses look themselves up there
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cases(soak: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return dict(soak.cases(tmp_path_factory.mktemp("soak")))


@pytest.mark.parametrize("name", ["train", "checkpoint", "capture", "study", "eval"])
def test_kills_lose_nothing(soak: Any, cases: dict[str, Any], tmp_path: Path, name: str) -> None:
    tally = soak.Tally()
    soak.soak(cases[name], tmp_path / name, 2, random.Random(name), tally)
    assert tally.kills == 2 and tally.runs >= 1


@pytest.mark.parametrize("name", ["train", "capture", "study"])
def test_an_orderly_stop_loses_nothing(soak: Any, cases: dict[str, Any], tmp_path: Path, name: str) -> None:
    tally = soak.Tally()
    soak.soak(cases[name], tmp_path / name, 1, random.Random(name), tally, signal.SIGTERM)
    assert tally.kills == 1


def test_what_is_lost_is_noticed(soak: Any, tmp_path: Path) -> None:
    """A command that forgets, and one that ends otherwise."""

    def case(progress: Callable[[Path], int], outcome: Callable[[Path], Any]) -> Any:
        return soak.Case(lambda out: ["schema"], progress, outcome)

    there = iter([3, 2, 1])
    never = iter(range(100))
    for number, (which, message) in enumerate(
        [(case(lambda path: next(there), lambda path: 0), "there were 3"), (case(lambda path: 0, lambda path: next(never)), "another")]
    ):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(soak.LostError, match=message):
            soak.soak(which, tmp_path / str(number) / "case", 2, Always(), soak.Tally())


class Always(random.Random):
    """Kills at once."""

    def uniform(self, a: float, b: float) -> float:
        return 0.0

    def random(self) -> float:
        return 1.0
