"""The objective: a weighted list of terms over one batch and one signal."""

from limbeck.objectives.base import HiddenTerm, Needs, OutputTerm, Term
from limbeck.objectives.ce import CrossEntropy
from limbeck.objectives.divergences import Divergence
from limbeck.objectives.hidden import Hidden
from limbeck.objectives.logits import Logits
from limbeck.objectives.mse_logits import MSELogits
from limbeck.objectives.published import HiddenAsPublished
from limbeck.objectives.ranking import Ranking
from limbeck.objectives.schedule import Schedule

__all__ = [
    "CrossEntropy",
    "Divergence",
    "Hidden",
    "HiddenAsPublished",
    "HiddenTerm",
    "Logits",
    "MSELogits",
    "Needs",
    "OutputTerm",
    "Ranking",
    "Schedule",
    "Term",
]
