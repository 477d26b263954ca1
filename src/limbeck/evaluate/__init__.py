"""Benchmarks and the runner that grades a model with them."""

from limbeck.evaluate.base import Benchmark, Item, Metric, Result, Subject

__all__ = ["Benchmark", "Item", "Metric", "Result", "Subject"]
