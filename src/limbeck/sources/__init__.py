"""Sources: who writes the tokens."""

from limbeck.sources.base import OpenSource, Source
from limbeck.sources.dataset import DatasetSource

__all__ = ["DatasetSource", "OpenSource", "Source"]
