"""Quantized: the teacher's last hidden states by transform coding; with its head, kept once, they give all of the vocabulary.

States are turned into a basis in which an error costs the same in every direction (the head's Fisher metric, on average over the
calibration documents) and components are uncorrelated, rounded to a step, and entropy-coded. A step of s costs about s^2/24 nats of KL
per component, but not at every token alike: where the teacher is sure, a coarser one does. So each token's step is the one with the least
KL + price * bytes, the KL estimated from the teacher's most probable tokens, and the price is what gives the wanted size on documents that
nothing else was fitted on.
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
"""A step that a smaller share of the calibration tokens would take is left out."""
_FITTED, _TRIED, _PRICED = 16384, 4096, 8192
"""Tokens for the basis and its scales, for those by step, and for the price: the last from documents of their own."""
_TRIES, _SLACK = 6, 0.004
"""How often the price is set anew, as blobs have fixed bytes besides, and what share of the wanted bytes may be left over."""
_TOKENS_PER_CHANNEL = 4
"""Calibration tokens from which a basis is worth its name."""
_PER_OCTAVE = 8
"""Tables are shared by components whose magnitude in steps is the same to within an eighth of an octave."""
_LARGEST = 14 * _PER_OCTAVE
"""Of a magnitude, and its negative the smallest."""
_TOP = 256
"""Tokens of which a step's change of the logits is computed; of the others, the mean is, and the spread is taken from the metric."""
_NOISE = 1e-3
"""Mass outside of those tokens below which their mean is taken to be 0."""
_ROWS = 64
"""Rows whose logits live at once, and what their arithmetic depends on: the last ones are filled up."""


class Quantized(Codec):
    """Last hidden states in about as many bytes as wanted; serves every temperature and divergence."""

    type: Literal["quantized"] = "quantized"
    bytes_per_token: float = Field(96.0, gt=1)
    """Bytes per scored token that the price is set for, on the documents of the certificate; other texts may take more or fewer."""

    needs_head: ClassVar[bool] = True
    tuned: ClassVar[str] = "bytes_per_token"
    ladder: ClassVar[tuple[float, ...]] = tuple(round(4 * 2 ** (i / 8), 1) for i in range(57))

    def meant_by(self, bytes_per_token: float | None) -> tuple[float, ...]:
        # blobs of more documents than the price is set on may be a little larger than wanted
        return () if bytes_per_token is None else tuple(share * bytes_per_token for share in (0.96, 0.98, 1.0))

    def calibrate(self, head: Head, outputs: Iterable[Tensor], others: Iterable[Tensor] = ()) -> dict[str, Tensor]:
        import torch

        rows = _spread(torch.cat([part.detach().float().cpu() for part in outputs]), _FITTED)
        mean = rows.mean(0)
        forward, back = _basis(rows, mean, fisher(head, rows))
        model = {"mean": mean, "forward": forward, "back": back, "steps": torch.tensor(STEPS, dtype=torch.float64)}
        components, tried = (rows - mean) @ forward, _spread(rows, _TRIED)
        scales = components.abs().mean(0).double().expand(len(STEPS), -1)
        model |= _shapes(components, scales, model["steps"])
        for _ in range(2):
            taken, _ = self._price(*_costs(head, model, tried), self.bytes_per_token)
            count = taken.bincount(minlength=len(model["steps"]))
            used = count >= _RARE * len(taken)
            coded = (tried - mean) @ forward
            scales = torch.stack([_scale(coded[taken == i], scales[i]) for i in used.nonzero()[:, 0].tolist()])
            model["steps"] = model["steps"][used]
            model |= _shapes(components, scales, model["steps"]) | {"frequency": (8 * count[used] + 1).int()}
        # what a table costs is told by documents that it has not seen
        documents = [part.detach().float().cpu() for part in others if len(part)] or [rows]
        return model | {"price": self._set_price(head, model, documents)}

    def _set_price(self, head: Head, model: Mapping[str, Tensor], documents: Sequence[Tensor]) -> Tensor:
        """The price at which the blobs of these documents have as many bytes as wanted, or hardly fewer."""
        import torch

        documents = documents[: int(np.searchsorted(np.cumsum([len(part) for part in documents]), _PRICED)) + 1]
        lengths, rows = [len(part) for part in documents], torch.cat(list(documents))
        divergence, size = _costs(head, model, rows)
        fixed = 0.0
        for _ in range(_TRIES):
            taken, price = self._price(divergence, size, self.bytes_per_token - fixed)
            over = sum(map(len, self._write(model, rows, taken, lengths))) / len(rows) - self.bytes_per_token
            if -_SLACK * self.bytes_per_token <= over <= 0:
                break
            fixed += over + _SLACK / 2 * self.bytes_per_token
        return torch.tensor([price], dtype=torch.float64)

    def doubt(self, outputs: Iterable[Tensor]) -> str | None:
        documents = list(outputs)
        count, width = sum(map(len, documents)), documents[0].shape[1]
        if count >= _TOKENS_PER_CHANNEL * width:
            return None
        return (
            f"{count:,} calibration tokens are few for the {width} channels of the teacher's states, expected "
            f"{_TOKENS_PER_CHANNEL * width:,} or more: {self.type!r} loses much. Raise capture.calibrate_on, or set codec 'topk'"
        )

    def encode(self, head: Head, model: Mapping[str, Tensor], output: Tensor, lengths: Sequence[int]) -> list[bytes]:
        rows = output.detach().float().cpu()
        divergence, size = _costs(head, model, rows)
        return self._write(model, rows, (divergence + model["price"] * size).argmin(1), lengths)

    def _write(self, model: Mapping[str, Tensor], rows: Tensor, taken: Tensor, lengths: Sequence[int]) -> list[bytes]:
        """A blob per sample, of rows whose steps are chosen."""
        of_steps, tables = _tables(model)
        components = (rows - model["mean"]) @ model["forward"]
        symbols = _symbols(components, model["steps"][taken, None], _halves(model)[taken]).int()
        blobs = []
        for steps, values in zip(taken.split(list(lengths)), symbols.split(list(lengths)), strict=True):
            if not len(steps):
                blobs.append(b"")
                continue
            order, ends = _order(model, steps.numpy())
            parts = np.split(values.numpy().ravel()[order], ends[:-1])
            blobs.append(
                np.array([len(steps)], "<u4").tobytes() + entropy.write([(steps.numpy(), of_steps), *zip(parts, tables, strict=True)])
            )
        return blobs

    def decode(self, head: Head | None, model: Mapping[str, Tensor], blobs: Sequence[bytes], rows: Sequence[np.ndarray]) -> Signal:
        import torch

        from limbeck.batch import Signal

        assert head is not None
        of_steps, tables = _tables(model)
        halves, sizes = _halves(model).numpy(), model["steps"].numpy()
        parts = [torch.zeros(0, len(model["mean"]))]
        for blob, wanted in zip(blobs, rows, strict=True):
            if len(wanted):
                num, reader = int(np.frombuffer(blob[:4], "<u4")[0]), entropy.Reader(blob[4:])
                taken = reader.take(of_steps, num)
                order, ends = _order(model, taken)
                symbols = np.zeros(len(order), np.int64)
                counts = np.diff(ends, prepend=0).tolist()
                symbols[order] = np.concatenate([reader.take(table, count) for table, count in zip(tables, counts, strict=True)])
                components = (symbols.reshape(num, -1)[wanted] - halves[taken[wanted]]) * sizes[taken[wanted], None]
                parts.append(torch.from_numpy(components.astype(np.float32)) @ model["back"] + model["mean"])
        return Signal(output=torch.cat(parts).to(head.weight.dtype), teacher_head=head)

    def _price(self, divergence: Tensor, size: Tensor, wanted: float) -> tuple[Tensor, float]:
        """(each token's step, the price of a byte in nats) at which the tokens take the wanted bytes on average, or the nearest to that."""
        low, high = 1e-9, 10.0
        for _ in range(60):
            price = (low * high) ** 0.5
            taken = (divergence + price * size).argmin(1)
            if float(size.gather(1, taken[:, None]).mean()) > wanted:
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


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most so many rows, of all documents alike."""
    import torch

    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), count)).long()]


def _symbols(components: Tensor, step: Tensor | float, half: Tensor) -> Tensor:
    """Whole steps, counted from 0; beyond its table a component is cut."""
    return ((components / step).round().clamp(-half, half) + half).long()


def _scale(components: Tensor, common: Tensor) -> Tensor:
    """Mean magnitude of each component on the tokens that take a step, with as much of the common one as 32 tokens have."""
    seen = components.abs().double()
    level = float(seen.mean() / common.mean())
    return (seen.sum(0) + 32 * level * common) / (len(seen) + 32)


def _shapes(components: Tensor, scales: Tensor, steps: Tensor) -> dict[str, Tensor]:
    """Which table `[S, E]` codes a component at a step, the tables' sizes, and their counts one after the other.

    A table serves all components of about the same magnitude in steps: what each was seen to be, with some of what a Laplace distribution
    expects. A table per component and step would know the calibration documents by heart. Room for half as much again as was seen."""
    import torch

    magnitude = (_PER_OCTAVE * (scales / steps[:, None]).log2()).round().clamp(-_LARGEST, _LARGEST)
    levels, shapes = magnitude.unique(return_inverse=True)
    highest = components.abs().amax(0).double() / steps[:, None]
    half = (
        torch.zeros(len(levels), dtype=torch.float64).scatter_reduce(0, shapes.flatten(), (1.5 * highest).flatten(), "amax").ceil().long()
        + 1
    )
    sizes = 2 * half + 1
    starts = sizes.cumsum(0) - sizes
    seen = torch.zeros(int(sizes.sum()), dtype=torch.int64)
    for step, its in zip(steps.tolist(), shapes, strict=True):
        seen += torch.bincount((_symbols(components, step, half[its]) + starts[its]).flatten(), minlength=len(seen))
    counts = []
    for level, each, part in zip(levels.tolist(), half.tolist(), seen.split(sizes.tolist()), strict=True):
        expected = torch.exp(-(torch.arange(-each, each + 1).abs() / 2 ** (level / _PER_OCTAVE)))
        share = 0.99 * expected / expected.sum() + 0.01 / len(expected)
        total = part.sum() + 256
        counts.append((2**24 * (part + 256 * share) / total).round().clamp(min=1).int())
    return {"shapes": shapes.int(), "sizes": sizes.int(), "counts": torch.cat(counts)}


def _halves(model: Mapping[str, Tensor]) -> Tensor:
    """`[S, E]`: the symbol of 0."""
    return (model["sizes"].long() // 2)[model["shapes"].long()]


def _order(model: Mapping[str, Tensor], taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The components of tokens that took these steps, table by table: (their places, where each table's end)."""
    shapes = model["shapes"].numpy()[taken].ravel()
    return np.argsort(shapes, kind="stable"), np.bincount(shapes, minlength=len(model["sizes"])).cumsum()


def _tables(model: Mapping[str, Tensor]) -> tuple[Any, list[Any]]:
    """The coder's tables: that of the steps, and those of the components."""
    return entropy.table_of(model["frequency"].numpy()), entropy.tables_of(
        model["counts"].numpy().tobytes(), model["sizes"].numpy().tobytes()
    )


def _costs(head: Head, model: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """(KL in nats, bytes), `[n, S]` each, of every row at every step. The KL is an estimate: a step changes the logits of the most
    probable tokens as it does; those of the others as a normal distribution whose mean is right."""
    import torch

    components = (rows - model["mean"]) @ model["forward"]
    sizes, halves, steps = model["sizes"].long(), _halves(model), model["steps"].tolist()
    starts = (sizes.cumsum(0) - sizes)[model["shapes"].long()]
    counts = model["counts"].split(sizes.tolist())
    bits = -torch.cat([torch.from_numpy(entropy.probabilities_of(part.numpy())).log2() for part in counts])
    divergence, size = torch.zeros(len(rows), len(steps), dtype=torch.float64), torch.zeros(len(rows), len(steps), dtype=torch.float64)
    for begin in range(0, len(rows), _ROWS):
        part = slice(begin, min(begin + _ROWS, len(rows)))
        errors = []
        for i, step in enumerate(steps):
            symbols = _symbols(components[part], step, halves[i])
            size[part, i] = bits[starts[i] + symbols].sum(1) / 8
            errors.append((symbols - halves[i]) * step - components[part])
        divergence[part] = _divergence(head, model["back"], rows[part], torch.stack(errors, 1))
    return divergence, size


def _divergence(head: Head, back: Tensor, rows: Tensor, errors: Tensor) -> Tensor:
    """`[n, S]`: KL of rows `[n, E]` that come back with errors `[n, S, E]` of their components."""
    import torch

    filled = torch.nn.functional.pad(rows, (0, 0, 0, _ROWS - len(rows))).to(head.weight.device)
    with torch.no_grad():
        logits, weight = head(filled), head.weight.float()
        probs = torch.softmax(logits, -1)
        top, ids = probs.topk(min(_TOP, probs.shape[1]), -1)
        slope = head.slope(logits)
        changes = torch.nn.functional.pad(errors.float(), (0, 0, 0, 0, 0, _ROWS - len(rows))).to(weight.device) @ back.to(weight.device)
        overall = torch.einsum("nse,ne->ns", changes, (probs * slope) @ weight)  # mean change of all logits
        of_top = torch.einsum("nse,nke->nsk", changes, weight[ids]) * (
            slope.gather(-1, ids)[:, None] if isinstance(slope, torch.Tensor) else slope
        )
        known = (top[:, None] * of_top).sum(-1)
        rest = (1 - top.sum(-1, keepdim=True)).clamp(min=1e-30)
        # of less than this the mean would be the rounding noise of the sums
        mean = ((overall - known) / rest).where(rest > _NOISE, 0.0)
        spread = torch.nn.functional.pad(errors.float().square().sum(-1) / 2, (0, 0, 0, _ROWS - len(rows))).to(weight.device)
        total = torch.logaddexp((top.log()[:, None] + of_top).logsumexp(-1), rest.log() + mean + spread)
        return (total - known - rest * mean)[: len(rows)].double().cpu()
