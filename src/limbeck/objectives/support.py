"""The support on which student and teacher are compared. Here: dense, the whole shared vocabulary.

A support answers for log-probabilities and probabilities at a temperature and remembers them, so that several terms share one softmax.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LOG_ZERO = -1e30


class Dense:
    """Logits `[n, V]` of a chunk as distributions, in float32 whatever the model's dtype.

    `in_place` lets the logits be overwritten by their own log-softmax (a shift, so they stay logits for every other temperature);
    only for tensors that nothing else uses and that carry no gradient.
    """

    def __init__(self, logits: Float[Tensor, "n v"], in_place: bool = False) -> None:
        logits = logits.float()
        log_normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
        self.logits = logits.sub_(log_normaliser) if in_place else logits - log_normaliser
        # a finite log 0, so that 0 log 0 is 0: a teacher may rule tokens out with a logit of -inf
        self.logits = self.logits.clamp_(min=LOG_ZERO) if in_place else self.logits.clamp(min=LOG_ZERO)
        self._log_probs: dict[float, Tensor] = {1.0: self.logits}
        self._probs: dict[float, Tensor] = {}

    def log_probs(self, temperature: float = 1.0) -> Float[Tensor, "n v"]:
        """log softmax(logits / T)."""
        if temperature not in self._log_probs:
            self._log_probs[temperature] = torch.log_softmax(self.logits / temperature, dim=-1)
        return self._log_probs[temperature]

    def probs(self, temperature: float = 1.0) -> Float[Tensor, "n v"]:
        """softmax(logits / T)."""
        if temperature not in self._probs:
            self._probs[temperature] = self.log_probs(temperature).exp()
        return self._probs[temperature]
