"""Optimizer and learning-rate schedule. The learning rate is a pure function of the step, so that a resume has nothing to restore."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from limbeck.spec import Spec

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import AdamW


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Spec):
    """AdamW with warm-up and decay."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate. The one setting that must be swept before methods are compared."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the gradient's running mean and of its square."""
    epsilon: float = Field(1e-8, gt=0)
    """Keeps the step finite where a gradient was always 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices; biases and norms are not decayed."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this norm over all parameters; null does not clip."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Decay after the warm-up; `wsd` stays at the peak and decays linearly over the last `decay_fraction` of the steps."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises linearly from 0 to its peak."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of the steps at the end over which `wsd` decays."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """The rate at the end, as a share of the peak (cosine, linear, wsd)."""

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        warmup = round(self.warmup_fraction * num_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        # the last step at the peak
        start = warmup if self.schedule != "wsd" else max(num_steps - 1 - round(self.decay_fraction * num_steps), warmup)
        passed = min(max((step - start) / max(num_steps - 1 - start, 1), 0.0), 1.0)
        remaining = 0.5 * (1 + math.cos(math.pi * passed)) if self.schedule == "cosine" else 1 - passed
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * remaining)


def build(spec: Optimizer, module: nn.Module) -> AdamW:
    """AdamW over the trainable parameters, with decay on matrices only."""
    from torch.optim import AdamW

    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # fused: one pass over memory instead of a dozen; an eighth of the time on a CPU
    return AdamW(groups, lr=spec.learning_rate, betas=spec.betas, eps=spec.epsilon, fused=True)
