"""Code of the user's that a recipe names: modules that define terms, divergences, teachers, sources or benchmarks (`plugins`), and the
function of a data set (`convert`). Nothing that a recipe does not name is imported, and nothing that a model or a capture brings along.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import model_validator

from limbeck.errors import LimbeckError, RecipeError, nearest
from limbeck.log import say
from limbeck.spec import Spec

_loaded: set[str] = set()


class Extensible(Spec):
    """What may name things that plugins define."""

    @model_validator(mode="before")
    @classmethod
    def _with_plugins(cls, tree: Any) -> Any:
        return load(tree)


def load(tree: Any) -> Any:
    """Import the plugins of a recipe that is not read yet, or of a study's base, so that it may name what they define; returns it.
    What is no list of names is left to the recipe to refuse."""
    base = tree.get("base", tree) if isinstance(tree, dict) else None
    names = base.get("plugins") if isinstance(base, dict) else None
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and name not in _loaded:
            module = imported(name, "plugins", RecipeError)
            _loaded.add(name)
            say(f"plugin {name}: {getattr(module, '__file__', None) or 'built in'}")
    return tree


def contents(names: Iterable[str]) -> dict[str, str | None]:
    """SHA-256 of each module's file: one that was edited makes another run."""
    found = {}
    for name in names:
        file = Path(getattr(imported(name, "plugins", RecipeError), "__file__", None) or "")
        found[name] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    return found


def imported(name: str, what: str, error_class: type[LimbeckError]) -> ModuleType:
    """A module, looked for in the working directory first."""
    here = os.getcwd()
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise error_class(f"{what}: found {name!r}, expected the name of a module, such as my_package.my_terms")
    sys.path.insert(0, here)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise error_class(f"{what}: {name} imports {error.name!r}, which is not installed") from error
        hint = nearest(name, [file.stem for file in Path(here).glob("*.py")])
        raise error_class(f"{what}: found no module {name!r} in {here} or among what is installed{hint}") from None
    except LimbeckError:
        raise
    except Exception as error:  # the user's code: whatever it raises
        raise error_class(f"{what}: importing {name} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
