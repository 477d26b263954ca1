"""The output head and the output terms, a chunk of scored tokens at a time.

`fused` computes the gradient in the chunk's forward: logits live only for one chunk, nothing is kept for backward but the ready
gradients of hidden states and head weight, and a scored token costs three head matmuls. Because a ready gradient cannot be
re-weighted later, the terms' scales go in. Matmuls want many rows and softmaxes few, so the matmuls take a chunk and the terms a block
of it at a time, and turn the logits into their gradient in place. `plain` is the same mathematics by autograd over all rows at once:
the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.batch import Draws, Signal, TopK
from limbeck.errors import ModelError
from limbeck.objectives.base import OutputTerm, gates
from limbeck.objectives.support import Dense, DenseTarget, Gradient, SampledTarget, SpreadTarget, Target, TopKTarget

OutputTerms = Mapping[str, OutputTerm]
LIVE_BUFFERS = 2
"""Tensors `[n, V]` that a chunk keeps: the student's logits, which become their gradient, and a dense teacher's."""
ALIGNED = 16
"""Rows of a chunk are a multiple of it where they are more: matmuls compute tiles of rows, and a part of one costs as much as a whole."""
BLOCK_NUMBERS = {"cpu": 2**20}
"""Logits of a block, by device: 4 MB a tensor, which stays in a CPU's cache; softmaxes of a whole chunk take two to five times as long."""
FEWEST_COMPILED = 2
"""Rows of a block that is compiled: for 0 and 1, dynamic shapes would be compiled apart."""
BLOCK_NUMBERS_ELSEWHERE = 2**25
"""Enough to fill an accelerator, and 128 MB a tensor."""


@dataclass(frozen=True)
class Head:
    """An output head `rows [n, D] -> logits [n, V]`: a linear map, then an optional factor, then an optional soft cap `c tanh(z / c)`."""

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, rows: Float[Tensor, "n d"], out: Float[Tensor, "n v"] | None = None) -> Float[Tensor, "n v"]:
        """Logits in float32; in `out` where that can be (rows in float32, no gradient), else in a new tensor."""
        weight, bias = self.weight.to(rows.dtype), None if self.bias is None else self.bias.to(rows.dtype)
        if out is None or rows.dtype != torch.float32:
            logits = torch.nn.functional.linear(rows, weight, bias).float()
        elif bias is None:
            logits = torch.mm(rows, weight.T, out=out)
        else:
            logits = torch.addmm(bias, rows, weight.T, out=out)
        if self.scale != 1.0:
            logits = logits * self.scale if out is None else logits.mul_(self.scale)
        if self.soft_cap is None:
            return logits
        if out is None:
            return self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)

    def slope(self, logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"] | float:
        """d(logits)/d(output of the linear map), from the logits."""
        return self.scale if self.soft_cap is None else self.scale * (1 - (logits / self.soft_cap) ** 2)

    def cut(self, num_tokens: int) -> Head:
        """The head without the padded rows of its vocabulary: they are no tokens and get no probability."""
        if num_tokens > self.weight.shape[0]:
            raise ModelError(
                f"found an output head of {self.weight.shape[0]} rows, expected one for each of the tokenizer's {num_tokens} tokens"
            )
        if num_tokens == self.weight.shape[0]:
            return self  # the gradient of a slice, even of a whole one, is a copy
        return Head(self.weight[:num_tokens], None if self.bias is None else self.bias[:num_tokens], self.scale, self.soft_cap)


Compiled = Callable[[Head, Tensor, Tensor | None, TopK | Draws | None, Tensor, Mapping[str, float]], Tensor]
"""What does the same as `_block`: (head, logits, a dense teacher's logits, its sparse signal, targets, scales) to the sums."""


def num_chunks(max_rows: int, vocabulary: int, memory_mb: int) -> int:
    """Chunks for which a microbatch of `max_rows` scored tokens stays within `memory_mb`. Depends on the recipe only: every rank
    calls the head equally often, also with an empty microbatch."""
    rows = max(memory_mb * 2**20 // (LIVE_BUFFERS * 4 * vocabulary), 1)
    return max(-(-max_rows // (rows - rows % ALIGNED or rows)), 1)


def fused(
    hidden: Float[Tensor, "n d"],
    head: Head,
    targets: Int[Tensor, " n"],
    signal: Signal,
    terms: OutputTerms,
    scales: Mapping[str, float],
    chunks: int,
    compiled: Compiled | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The scaled sum of all output terms, which carries the gradient, and the detached unscaled sum of each (and what `_sum_keys` adds)."""
    loss, stacked = _FusedHead.apply(hidden, head.weight, head.bias, head, targets, signal, terms, scales, chunks, compiled)
    return loss, dict(zip(_sum_keys(terms, signal), stacked.unbind(), strict=True))


def plain(
    hidden: Float[Tensor, "n d"], head: Head, targets: Int[Tensor, " n"], signal: Signal, terms: OutputTerms, scales: Mapping[str, float]
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The same by autograd, with the logits of all rows alive: the reference for `fused`, and for new terms."""
    student, teacher = Dense(head(hidden)), target_of(signal, slice(None))
    values = {key: term.values(student, teacher, targets) for key, term in terms.items()}
    loss = sum((value.sum() * scales[key] for key, value in values.items()), hidden.sum() * 0.0)
    sums = {key: value.detach().sum() for key, value in values.items()}
    sums.update({key: term.gate(teacher, targets).sum() for key, term in gates(terms).items()})
    if isinstance(teacher, DenseTarget):
        sums["teacher_nll"] = _nll(teacher, targets)
    return loss, sums


def _sum_keys(terms: OutputTerms, signal: Signal) -> list[str]:
    is_dense = signal.output is not None or (isinstance(signal.sparse, TopK) and signal.sparse.log_priors is not None)
    return [*terms, *gates(terms), *(["teacher_nll"] if is_dense else [])]


def target_of(signal: Signal, rows: slice, logits: Tensor | None = None, memory: Tensor | None = None) -> Target | None:
    """The teacher of some rows on the support that the signal has; a dense one from its `logits` if they are made, which are lost where
    there is `memory` for its probabilities."""
    if isinstance(signal.sparse, Draws):
        return SampledTarget(signal.sparse[rows])
    if signal.sparse is not None:
        top = signal.sparse[rows]
        target = TopKTarget(top.ids, top.log_probs, top.log_tails)
        return target if top.log_priors is None else SpreadTarget(target, top.log_priors)
    if signal.output is None or signal.teacher_head is None:
        return None
    with torch.no_grad():
        return DenseTarget(signal.teacher_head(signal.output[rows]) if logits is None else logits, memory)


def _buffers(rows: int, vocabulary: int, like: Tensor, signal: Signal) -> list[Tensor]:
    """Memory `[rows, V]` for the student's logits and a dense teacher's, taken once and used by every chunk."""
    count = 1 if signal.sparse is not None or signal.output is None else LIVE_BUFFERS
    return [torch.empty(rows, vocabulary, dtype=torch.float32, device=like.device) for _ in range(count)]


def _teacher_logits(signal: Signal, rows: slice, buffers: Sequence[Tensor]) -> Tensor | None:
    """The logits of a dense teacher; None without one."""
    if signal.sparse is not None or signal.output is None or signal.teacher_head is None:
        return None
    output, head = signal.output[rows], signal.teacher_head
    with torch.no_grad():
        return head(output, buffers[1][: len(output)]) if isinstance(head, Head) else head(output).float()


def _nll(teacher: DenseTarget, targets: Tensor) -> Tensor:
    """Sum of the teacher's negative log-likelihood of the targets: its own fit of the data, logged beside the losses."""
    return -teacher.log_probs().gather(-1, targets[:, None]).sum()


class _FusedHead(torch.autograd.Function):
    """Loss and its ready gradients. Inputs that need no gradient (a frozen head) cost none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        targets: Tensor,
        signal: Signal,
        terms: OutputTerms,
        scales: Mapping[str, float],
        chunks: int,
        compiled: Compiled | None,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants_any = wants_hidden or wants_weight or wants_bias
        # Inside forward the arguments are detached; the head is rebuilt on them so that no graph is recorded, also under FSDP.
        head = Head(weight, bias, head.scale, head.soft_cap)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight: Tensor | None = None  # the first chunk writes it, the others add: to fill it with zeros would cost a pass
        grad_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        keys = _sum_keys(terms, signal)
        sums = torch.zeros(len(keys), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            size = -(-hidden.shape[0] // chunks)
            size += -size % ALIGNED if size > ALIGNED else 0
            buffers = _buffers(min(size, hidden.shape[0]), weight.shape[0], hidden, signal)
            for start in range(0, hidden.shape[0], max(size, 1)):
                chunk = slice(start, min(start + size, hidden.shape[0]))
                grad, chunk_sums = _chunk(head, hidden[chunk], targets[chunk], signal, chunk, terms, scales, wants_any, buffers, compiled)
                sums += chunk_sums
                if grad is None:
                    continue
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, weight.to(grad.dtype), out=grad_hidden[chunk])
                if wants_weight:
                    grad_weight = _add_matmul(grad_weight, grad.T, hidden[chunk], weight.dtype)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.ready = (grad_hidden, grad_weight, grad_bias)
        scale_of = torch.tensor([scales.get(key, 0.0) for key in keys], device=hidden.device)
        ctx.mark_non_differentiable(sums)
        return (sums * scale_of).sum(), sums

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        ready, ctx.ready = ctx.ready, None
        if ready is None:
            raise RuntimeError(
                "the fused head gives its gradient away, so backward can run through it once; use the plain head to run it again"
            )
        factor = upstream[0]
        if factor.device.type != "cpu" or factor != 1:  # to ask an accelerator would make it wait
            for grad in ready:
                if grad is not None:
                    grad.mul_(factor.to(grad.dtype))  # in place: a copy would double the largest gradient of the step
        return (*ready, None, None, None, None, None, None, None)


def _add_matmul(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right, in place where the dtypes agree (bf16 rows against a float32 master weight do not)."""
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if dtype == left.dtype else total.add_((left @ right).to(dtype))


def _chunk(
    head: Head,
    rows: Tensor,
    targets: Tensor,
    signal: Signal,
    chunk: slice,
    terms: OutputTerms,
    scales: Mapping[str, float],
    wants_grad: bool,
    buffers: Sequence[Tensor],
    compiled: Compiled | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Gradient of the scaled loss w.r.t. the head's linear output (None where not wanted), and the sums of `_sum_keys`."""
    logits = head(rows, buffers[0][: len(rows)])
    taught = _teacher_logits(signal, chunk, buffers)
    sums = torch.zeros(len(_sum_keys(terms, signal)), device=rows.device)
    size = max(BLOCK_NUMBERS.get(rows.device.type, BLOCK_NUMBERS_ELSEWHERE) // logits.shape[1], 1)
    memory = [torch.empty_like(logits[:size]) for _ in range(1 if taught is None else 2)]  # new pages are slower than what is done on them
    for start in range(0, len(rows), size):
        block = slice(start, min(start + size, len(rows)))
        absolute = slice(chunk.start + block.start, chunk.start + block.stop)
        if compiled is not None and wants_grad and block.stop - start >= FEWEST_COMPILED:
            sparse = None if signal.sparse is None else signal.sparse[absolute]
            sums += compiled(head, logits[block], None if taught is None else taught[block], sparse, targets[block], scales)
            continue
        ours, *theirs = (part[: block.stop - start] for part in memory)
        teacher = target_of(signal, absolute) if taught is None else target_of(signal, absolute, taught[block], *theirs)
        sums += _block(head, logits[block], ours, teacher, targets[block], signal, terms, scales, wants_grad)
    return (logits if wants_grad else None), sums


def _block(
    head: Head,
    logits: Tensor,
    memory: Tensor,
    teacher: Target | None,
    targets: Tensor,
    signal: Signal,
    terms: OutputTerms,
    scales: Mapping[str, float],
    wants_grad: bool,
) -> Tensor:
    """The sums of `_sum_keys`; the logits become their gradient. `memory` takes the student's probabilities."""
    slope = head.slope(logits) if wants_grad else 1.0
    student = Dense(logits, memory)
    sums: dict[str, Tensor] = {}
    collected = Gradient()
    if wants_grad:
        forms = {key: term.closed_form(collected, scales[key], student, teacher, targets) for key, term in terms.items()}
        sums.update({key: values.sum() for key, values in forms.items() if values is not None})
    rest = {key: term for key, term in terms.items() if key not in sums}
    by_autograd = None
    if rest:
        with torch.set_grad_enabled(wants_grad):
            leaf = logits.detach().requires_grad_(wants_grad)  # shifted by its log-normaliser: no softmax sees that
            values = {key: term.values(Dense(leaf), teacher, targets).sum() for key, term in rest.items()}
            sums.update({key: value.detach() for key, value in values.items()})
            if wants_grad:
                (by_autograd,) = torch.autograd.grad(torch.stack([value * scales[key] for key, value in values.items()]).sum(), leaf)
    sums.update({key: term.gate(teacher, targets).sum() for key, term in gates(terms).items()})
    if isinstance(teacher, DenseTarget):
        sums["teacher_nll"] = _nll(teacher, targets)
    if wants_grad:
        collected.make(student)
        if by_autograd is not None:
            logits.add_(by_autograd)
        if not isinstance(slope, float) or slope != 1.0:
            logits.mul_(slope)
    return torch.stack([sums[key] for key in _sum_keys(terms, signal)])
