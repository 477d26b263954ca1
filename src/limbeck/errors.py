"""Errors that a user can act on. The command line prints their message and exits with code 2; anything else is a defect of ours.

A message names the key or file, what was found, what was expected, and the nearest valid choice.
"""

from __future__ import annotations

import difflib
import re
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


def out_of_memory(error: BaseException) -> str | None:
    """What to do about an error that says that there is no memory left; None of another. torch has no class of its own for main memory."""
    said = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and "out of memory" not in said and "can't allocate memory" not in said:
        return None
    return (
        f"out of memory ({said[:200] or type(error).__name__}). Set train.micro_batch_size=1 (the result is the same), a smaller "
        "train.head_memory_mb, or train.gradient_checkpointing=true; `limbeck plan` says what makes a recipe fit. A run goes on with these "
        "from its last checkpoint"
    )


_SECRETS = (
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1***@"),
    (re.compile(r"([?&;][\w.-]*(?:token|key|secret|signature|password|credential)[\w.-]*=)[^&;\s]+", re.IGNORECASE), r"\1***"),
)


def without_secrets(text: str) -> str:
    """A text in which URLs have no user, password or token any more: commands and messages are written down."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text
