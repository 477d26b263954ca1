"""The suite can fail: every mutant fits the code as it is, every loss has some, and a few are killed here (`scripts/mutate` runs all)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conformance.cases import DIVERGENCES, TERMS
from conformance.mutants import MUTANTS, PACKAGE, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_changes_the_code_at_one_place(mutant: Mutant) -> None:
    text = (PACKAGE / "objectives" / mutant.file).read_text(encoding="utf-8")
    changed = mutant.apply(text)
    assert changed != text
    compile(changed, mutant.file, "exec")


def test_every_loss_has_mutants() -> None:
    lacking = {loss.type for loss in (*DIVERGENCES, *TERMS)} - {mutant.loss for mutant in MUTANTS}
    assert not lacking, f"no mutant of {sorted(lacking)}: add ways to break it to tests/conformance/mutants.py"
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_few_mutants_are_killed() -> None:
    names = ["forward_kl: direction", "hidden: reduction"]
    script = Path(__file__).with_name("mutants.py")
    done = subprocess.run([sys.executable, str(script), "--only", *names, "--unchecked"], capture_output=True, text=True)
    assert done.returncode == 0 and "2 of 2 mutants killed" in done.stdout, done.stdout + done.stderr
