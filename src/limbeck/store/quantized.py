"""Quantized: the teacher's last hidden states by transform coding; with its head, kept once, they give all of the vocabulary.

States are turned into a basis in which an error costs the same in every direction (the head's Fisher metric, on average over the
calibration documents) and components are uncorrelated, rounded to a step, and entropy-coded. A step of s costs about s^2/24 nats of KL
per component, but not at every token alike: where the teacher is sure, a coarser one does. So each token's step is the one with the least
KL + price * bytes, as the teacher's own head measures them, and the price is what gives the wanted size on the calibration documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from limbeck.store import entropy
from limbeck.store.codec import Codec

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.batch import Signal
    from limbeck.objectives.head import Head

STEPS = tuple(0.02 * 2 ** (i / 2) for i in range(15))
"""From 0.02 to 2.6, in units in which a change of all components by one is a KL of about half their number."""
_RARE = 0.02
"""A step that a smaller share of the calibration tokens would take is left out: to try it costs a matmul of the head at every token."""
_FITTED, _PRICED = 16384, 512
"""Calibration tokens for the basis and the tables, and for the price."""
_ROWS = 32
"""Rows whose logits are compared at once, and what their arithmetic depends on: the last ones of a sample are filled up."""


class Quantized(Codec):
    """Last hidden states in about as many bytes as wanted; serves every temperature and divergence."""

    type: Literal["quantized"] = "quantized"
    bytes_per_token: float = Field(96.0, gt=1)
    """Bytes per scored token that the price is set for: more on texts of another kind than the calibration documents."""

    needs_head: ClassVar[bool] = True

    def calibrate(self, head: Head, outputs: Iterable[Tensor]) -> dict[str, Tensor]:
        import torch

        rows = torch.cat([part.detach().float().cpu() for part in outputs])
        # tokens of all documents alike
        rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _FITTED)).long()]
        mean = rows.mean(0)
        forward, back = _basis(rows, mean, fisher(head, rows))
        model = {"mean": mean, "forward": forward, "back": back}
        components = (rows - mean) @ forward
        steps = torch.tensor(STEPS, dtype=torch.float64)
        sizes, counts = _count(components, steps)
        some = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _PRICED)).long()]
        full = {**model, "steps": steps, "sizes": sizes, "counts": counts}
        taken, price = self._price(*_costs(head, full, some))
        used = taken.bincount(minlength=len(steps)) >= _RARE * len(taken)
        sizes, counts = _count(components, steps[used])
        full = {**model, "steps": steps[used], "sizes": sizes, "counts": counts}
        taken, price = self._price(*_costs(head, full, some))
        frequency = 8 * taken.bincount(minlength=int(used.sum())) + 1
        return {**full, "price": torch.tensor([price], dtype=torch.float64), "frequency": frequency.int()}

    def encode(self, head: Head, model: Mapping[str, Tensor], output: Tensor, lengths: Sequence[int]) -> list[bytes]:
        import torch

        blobs, (of_steps, tables) = [], _tables(model)
        for rows in output.detach().float().cpu().split(list(lengths)):
            if not len(rows):
                blobs.append(b"")
                continue
            divergence, size = _costs(head, model, rows)
            taken = (divergence + model["price"] * size).argmin(1)
            components = (rows - model["mean"]) @ model["forward"]
            parts = [(taken.numpy(), of_steps)]
            for i, step in enumerate(model["steps"].tolist()):
                at = taken == i
                if at.any():
                    symbols = _symbols(components[at], step, model["sizes"][i]).T.contiguous().to(torch.int32).numpy()
                    parts += zip(symbols, tables[i], strict=True)
            blobs.append(np.array([len(rows)], "<u4").tobytes() + entropy.write(parts))
        return blobs

    def decode(self, head: Head | None, model: Mapping[str, Tensor], blobs: Sequence[bytes], rows: Sequence[np.ndarray]) -> Signal:
        import torch

        from limbeck.batch import Signal

        assert head is not None
        of_steps, tables = _tables(model)
        parts = [torch.zeros(0, len(model["mean"]))]
        for blob, wanted in zip(blobs, rows, strict=True):
            if len(wanted):
                num, reader = int(np.frombuffer(blob[:4], "<u4")[0]), entropy.Reader(blob[4:])
                taken = reader.take(of_steps, num)
                components = np.zeros((num, len(model["mean"])), np.float32)
                for i, step in enumerate(model["steps"].tolist()):
                    at = taken == i
                    if at.any():
                        symbols = np.stack([reader.take(table, int(at.sum())) for table in tables[i]], 1)
                        components[at] = (symbols - model["sizes"][i].numpy() // 2) * step
                parts.append(torch.from_numpy(components[wanted]) @ model["back"] + model["mean"])
        return Signal(output=torch.cat(parts).to(head.weight.dtype), teacher_head=head)

    def _price(self, divergence: Tensor, size: Tensor) -> tuple[Tensor, float]:
        """(each token's step, the price of a byte in nats) at which the tokens take the wanted bytes on average, or the nearest to that."""
        low, high = 1e-9, 10.0
        for _ in range(60):
            price = (low * high) ** 0.5
            taken = (divergence + price * size).argmin(1)
            if float(size.gather(1, taken[:, None]).mean()) > self.bytes_per_token:
                low = price
            else:
                high = price
        return (divergence + high * size).argmin(1), high


def fisher(head: Head, rows: Tensor) -> Tensor:
    """Mean over rows of W'(diag p - pp')W, p the teacher's probabilities: KL(p, p') is half of this form of a small change of the state.
    A soft cap's slope is left out; what is measured is the choice of a basis only."""
    import torch

    weight = head.weight.float()
    mean, outer = torch.zeros(weight.shape[0], device=weight.device), torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    with torch.no_grad():
        for part in rows.to(weight.device).split(256):
            probs = torch.softmax(head(part), -1)
            expected = probs @ weight
            mean += probs.sum(0)
            outer += expected.T @ expected
        form = ((weight.T * mean) @ weight - outer).double().cpu() / len(rows) * head.scale**2
    return (form + form.T) / 2


def _basis(rows: Tensor, mean: Tensor, form: Tensor) -> tuple[Tensor, Tensor]:
    """(forward `[E, E]`, back): components are (h - mean) @ forward, largest first; uncorrelated, and `form` is the identity on them."""
    import torch

    values, vectors = torch.linalg.eigh(form)
    values = values.clamp(min=float(values.max()) * 1e-9 + 1e-30)
    root, inverse = vectors * values.sqrt() @ vectors.T, vectors * values.rsqrt() @ vectors.T
    centred = (rows - mean).double() @ root
    turn = torch.linalg.eigh(centred.T @ centred)[1].flip(1)
    # an eigenvector's sign is free; fixed, the same states give the same basis everywhere
    turn = turn * turn.gather(0, turn.abs().argmax(0, keepdim=True)).sign()
    return (root @ turn).float().contiguous(), (turn.T @ inverse).float().contiguous()


def _symbols(components: Tensor, step: float, sizes: Tensor) -> Tensor:
    """Whole steps, counted from 0; beyond its table a component is cut."""
    half = sizes // 2
    return ((components / step).round().clamp(-half, half) + half).long()


def _count(components: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """(sizes `[S, E]`, all tables' counts): how often each whole step was seen, with some of what a Laplace distribution of the same mean
    magnitude expects, so that what 16,000 tokens did not show costs a few bits and no more. Room for half as much again as was seen."""
    import torch

    sizes, counts = [], []
    for step in steps.tolist():
        half = (1.5 * components.abs().amax(0) / step).ceil().long() + 1
        sizes.append(2 * half + 1)
        symbols = _symbols(components, step, sizes[-1])
        magnitude = (components.abs().mean(0) / step).double().clamp(min=1e-3)
        for i, each in enumerate(half.tolist()):
            seen = symbols[:, i].bincount(minlength=2 * each + 1).double()
            expected = torch.exp(-(torch.arange(-each, each + 1).abs() / magnitude[i]))
            share = 0.99 * expected / expected.sum() + 0.01 / len(expected)
            counts.append((64 * seen + 64 * 16 * share).round().clamp(min=1).int())
    return torch.stack(sizes).int(), torch.cat(counts)


def _tables(model: Mapping[str, Tensor]) -> tuple[Any, list[list[Any]]]:
    """The coder's tables: that of the steps, and by step those of the components."""
    shape = model["sizes"].shape
    found = entropy.tables_of(model["counts"].numpy().tobytes(), model["sizes"].numpy().tobytes())
    return entropy.table_of(model["frequency"].numpy()), [found[i * shape[1] : (i + 1) * shape[1]] for i in range(shape[0])]


def _costs(head: Head, model: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """(KL in nats, bytes), `[n, S]` each, of every row at every step."""
    import torch

    components = (rows - model["mean"]) @ model["forward"]
    sizes, steps, device = model["sizes"].long(), model["steps"].tolist(), head.weight.device
    ends = sizes.flatten().cumsum(0)
    bits = -torch.cat([torch.from_numpy(entropy.probabilities_of(part.numpy())).log2() for part in model["counts"].tensor_split(ends[:-1])])
    starts = (ends - sizes.flatten()).reshape(sizes.shape)
    divergence, size = torch.zeros(len(rows), len(steps), dtype=torch.float64), torch.zeros(len(rows), len(steps), dtype=torch.float64)
    for begin in range(0, len(rows), _ROWS):
        part = slice(begin, min(begin + _ROWS, len(rows)))
        count = part.stop - begin

        def log_probs(states: Tensor, count: int = count) -> Tensor:
            filled = torch.nn.functional.pad(states, (0, 0, 0, _ROWS - count)).to(device)
            with torch.no_grad():
                return torch.log_softmax(head(filled), -1)[:count].clamp(min=-1e30)

        exact = log_probs(rows[part])
        probs = exact.exp()
        for i, step in enumerate(steps):
            symbols = _symbols(components[part], step, sizes[i])
            size[part, i] = bits[starts[i] + symbols].sum(1) / 8
            kept = (symbols - sizes[i] // 2) * step @ model["back"] + model["mean"]
            divergence[part, i] = (probs * (exact - log_probs(kept))).sum(-1).double().cpu()
    return divergence, size
