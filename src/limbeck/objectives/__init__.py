"""The objective: a weighted list of terms over one batch and one signal."""

from limbeck.objectives.base import HiddenTerm, Needs, OutputTerm, Term
from limbeck.objectives.ce import CrossEntropy
from limbeck.objectives.hidden import Hidden
from limbeck.objectives.logits import Logits

__all__ = ["CrossEntropy", "Hidden", "HiddenTerm", "Logits", "Needs", "OutputTerm", "Term"]
