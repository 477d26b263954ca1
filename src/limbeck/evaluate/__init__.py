"""Benchmarks and the runner that grades a model with them. Importing the package registers every benchmark, and loads no torch."""

from limbeck.evaluate.agreement import Agreement
from limbeck.evaluate.base import Benchmark, Item, Metric, Result, Subject
from limbeck.evaluate.bits_per_byte import BitsPerByte
from limbeck.evaluate.exact_match import ExactMatch
from limbeck.evaluate.function_calling import FunctionCalling
from limbeck.evaluate.harness import Harness
from limbeck.evaluate.multiple_choice import MultipleChoice
from limbeck.evaluate.runner import evaluate, evaluate_model

__all__ = [
    "Agreement",
    "Benchmark",
    "BitsPerByte",
    "ExactMatch",
    "FunctionCalling",
    "Harness",
    "Item",
    "Metric",
    "MultipleChoice",
    "Result",
    "Subject",
    "evaluate",
    "evaluate_model",
]
