"""Data sets of the Hugging Face hub: the adapter of `datasets`, an optional package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from limbeck.errors import DataError
from limbeck.tokens.arrow import without_nulls
from limbeck.tokens.files import EXTRA


def hub_rows(name: str, subset: str | None, split: str, revision: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one split; read from the local copy that `datasets` keeps, which is made on the first use. Nothing in it is executed."""
    require_datasets(name)
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # of many kinds, with no common base: no network, no such set, subset, split or revision
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        offline = (
            "; HF_HUB_OFFLINE is set, and there is no local copy of it" if datasets.config.HF_HUB_OFFLINE and "ffline" in cause else ""
        )
        raise DataError(
            f"data set {name!r} (subset {subset or 'default'}, split {split}) cannot be loaded{offline}\n  cause: {cause}"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    yield from map(without_nulls, found)


def require_datasets(name: str) -> None:
    """Refuse early, without importing it, where the package is missing."""
    from importlib.util import find_spec

    if find_spec("datasets") is None:
        raise DataError(f"data set {name!r}: data sets of the hub need the package `datasets`, which is not installed; {EXTRA}")
