"""Errors that a user can act on. The command line prints their message and exits with code 2; anything else is a defect of ours.

A message names the key or file, what was found, what was expected, and the nearest valid choice.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LimbeckError(Exception):
    """Bad input or an unmet condition outside of our code; the message is for the user."""


class RecipeError(LimbeckError):
    """A recipe (or study) that cannot be run: unknown key, wrong type, impossible combination."""


class DataError(LimbeckError):
    """A dataset or conversation that cannot be used as asked."""


class ModelError(LimbeckError):
    """A model or tokenizer that is missing, unsupported, or does not fit its partner."""


class StoreError(LimbeckError):
    """A capture that is damaged or does not fit the recipe that wants to use it."""


class RunError(LimbeckError):
    """A run directory or checkpoint that cannot be used, or a run that had to stop."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The tail of an error message: `; did you mean 'x'?`, or the empty string where nothing is near."""
    match = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
