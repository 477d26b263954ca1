"""Other ways to compute the same: blocks of the head through torch.compile, and Liger's kernels in the student's blocks. The one place that
knows either. Results are those of the code that they stand for, to rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.batch import Draws, Signal, TopK
from limbeck.errors import ModelError, RecipeError
from limbeck.objectives.base import OutputTerm, gates
from limbeck.objectives.head import Head, target_of
from limbeck.objectives.support import Dense, DenseTarget


class CompiledBlock:
    """The terms over a block of logits, compiled once for any number of rows. The gradient is autograd's, of the same values that the terms
    have elsewhere: closed forms are written for memory that is used again, and a compiler finds its own."""

    def __init__(self, terms: Mapping[str, OutputTerm]) -> None:
        self.keys, self._is_new = tuple(terms), True
        gated = gates(terms)

        def rows(logits: Tensor, taught: Tensor | None, sparse: TopK | Draws | None, targets: Tensor) -> tuple[Tensor, Tensor]:
            """Values `[terms, n]`, and what is summed beside them `[others, n]`."""
            student = Dense(logits)
            teacher = DenseTarget(taught) if taught is not None else target_of(Signal(sparse=sparse), slice(None))
            values = torch.stack([term.values(student, teacher, targets) for term in terms.values()])
            others = [term.gate(teacher, targets).float() for term in gated.values()]
            if isinstance(teacher, DenseTarget):
                others.append(-teacher.log_probs_of(targets))
            return values, torch.stack(others) if others else values[:0]

        torch.compiler.reset()  # what was compiled for an earlier objective counts against a limit
        self._rows = torch.compile(rows)

    def __call__(
        self,
        head: Head,
        logits: Tensor,
        taught: Tensor | None,
        sparse: TopK | Draws | None,
        targets: Tensor,
        scales: Mapping[str, float],
    ) -> Tensor:
        """The sums of the head's keys; the logits become their gradient."""
        slope = head.slope(logits)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            for tensor in (leaf, taught, targets, *_tensors(sparse)):
                if tensor is not None:
                    torch._dynamo.mark_dynamic(tensor, 0)
            values, others = self._run(leaf, taught, sparse, targets)
            sums = values.sum(1)
            (grad,) = torch.autograd.grad(sum(total * scales[key] for key, total in zip(self.keys, sums, strict=True)), leaf)
        logits.copy_(grad)
        if not isinstance(slope, float) or slope != 1.0:
            logits.mul_(slope)
        return torch.cat([sums.detach(), others.detach().sum(1)])

    def _run(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        if not self._is_new:
            return self._rows(*arguments)
        self._is_new = False
        try:
            return self._rows(*arguments)
        except Exception as error:  # a compiler that is missing or fails has many names
            raise ModelError(
                f"train.kernels: 'compile' failed, expected a C++ compiler for a CPU and Triton for an accelerator; without it the result "
                f"is the same\n  cause: {' '.join(str(error).split())[:300]}"
            ) from error


def _tensors(sparse: TopK | Draws | None) -> list[Tensor]:
    """Those with a row per token."""
    if sparse is None:
        return []
    if isinstance(sparse, Draws):
        return [sparse.ids, sparse.weights, sparse.neg_entropy]
    return [sparse.ids, sparse.log_probs, *sparse.log_tails.values()]


LOSSES = frozenset({"cross_entropy", "fused_linear_cross_entropy"})
"""Of Liger's parts, those whose place the output head has."""


def refuse_cpu(device: str) -> None:
    """Liger's kernels do not run on one: say so before a model is loaded."""
    if torch.device(device).type == "cpu":
        raise RecipeError(
            "train.kernels: found 'liger' on a CPU, expected an accelerator: its kernels are Triton's; without it the result is the same"
        )


def use_liger(model: Any) -> None:
    """Put Liger's kernels in the place of the model's norms, rotary embeddings and gated MLPs. A function that transformers keeps once per
    family, as the rotary embedding, is another for all its models in this process."""
    from liger_kernel.transformers import monkey_patch

    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    kind = model.config.get_text_config().model_type
    if kind not in known:
        raise ModelError(
            f"train.kernels: liger has no kernels for models of type {kind!r}, expected one of: {', '.join(sorted(known))}; remove 'liger'"
        )
    parts = [name for name, its in inspect.signature(known[kind]).parameters.items() if isinstance(its.default, bool)]
    known[kind](**{name: name not in LOSSES for name in parts}, model=model)
