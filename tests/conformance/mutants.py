"""Broken losses, and whether the suite notices: each mutant is one textual change of the package, which must match exactly once.

    scripts/mutate                    # all of them, with a table; exit code 1 if one survives
    scripts/mutate --only jsd         # those of one loss, or one by its name

A mutant lives in a copy of the package, in a process of its own that is forked after the heavy imports.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "limbeck"


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in that file of `objectives/`, within the class or function that `within` names (everywhere: "")."""

    loss: str
    kind: str
    within: str
    old: str
    new: str
    file: str = "divergences.py"

    @property
    def name(self) -> str:
        return f"{self.loss}: {self.kind}"

    def apply(self, text: str) -> str:
        """The changed text of the file; ValueError where `old` is not there exactly once."""
        start, end = 0, len(text)
        if self.within:
            found = re.search(rf"^(class|def) {self.within}\b.*?(?=^[^\s)]|\Z)", text, re.MULTILINE | re.DOTALL)
            if not found:
                raise ValueError(f"{self.name}: {self.file} has no {self.within}")
            start, end = found.span()
        part = text[start:end]
        if part.count(self.old) != 1:
            raise ValueError(f"{self.name}: found {self.old!r} {part.count(self.old)} times in {self.within or self.file}, expected once")
        return text[:start] + part.replace(self.old, self.new) + text[end:]


def _more(file: str, *rows: tuple[str, str, str, str, str]) -> list[Mutant]:
    return [Mutant(*row, file=file) for row in rows]


MUTANTS = [
    *_more(
        "divergences.py",
        ("forward_kl", "direction", "forward_kl", "(teacher_log_probs.exp() *", "(student_log_probs.exp() *"),
        ("forward_kl", "sign of the gradient", "ForwardKL", "[(bins.p, -1.0)]", "[(bins.p, 1.0)]"),
        ("forward_kl", "no entropy", "ForwardKL", "(bins.log_p - bins.log_q)", "(-bins.log_q)"),
        ("forward_kl", "temperature factor", "ForwardKL", "t_squared: ClassVar[bool] = True", "t_squared: ClassVar[bool] = False"),
        ("forward_kl", "said not to be linear", "ForwardKL", "linear_in_teacher: ClassVar[bool] = True", "pass"),
        ("reverse_kl", "direction", "reverse_kl", "(student_log_probs, teacher_log_probs)", "(teacher_log_probs, student_log_probs)"),
        ("reverse_kl", "sign", "ReverseKL", "(bins.log_q - bins.log_p)", "(bins.log_p - bins.log_q)"),
        ("reverse_kl", "temperature factor", "ReverseKL", "t_squared: ClassVar[bool] = True", "pass"),
        ("reverse_kl", "reduction", "ReverseKL", "excess.sum(-1), [", "excess.mean(-1), ["),
        ("symmetric_kl", "weights swapped", "SymmetricKL", "w * forward_kl(", "(1 - w) * forward_kl("),
        ("symmetric_kl", "gradient of one direction", "SymmetricKL", "(bins.p, -w)", "(bins.p, w - 1)"),
        ("symmetric_kl", "temperature factor", "SymmetricKL", "t_squared: ClassVar[bool] = True", "pass"),
        ("adaptive_kl", "head of another mass", "", "_HEAD_MASS = 0.5", "_HEAD_MASS = 0.9"),
        ("adaptive_kl", "tail in the head", "_head_share", "p[:, :-1] if bins.has_tail else p", "p"),
        ("adaptive_kl", "head without a token", "_head_share", "is_head[:, 0] = True", "pass"),
        ("adaptive_kl", "weights with a gradient", "_head_share", "bins.p.detach(), bins.q.detach()", "bins.p, bins.q"),
        ("adaptive_kl", "0 / 0", "_head_share", ".nan_to_num_(nan=1.0)", ""),
        ("adaptive_kl", "sign", "AdaptiveKL", "(excess, 1 - w)", "(excess, w - 1)"),
        ("adaptive_kl", "temperature factor", "AdaptiveKL", "t_squared: ClassVar[bool] = True", "pass"),
        ("jsd", "shares swapped", "JSD", "_log_mixture(bins, self.beta)", "_log_mixture(bins, 1 - self.beta)"),
        ("jsd", "weights swapped", "JSD", "= self.beta * of_teacher + (1 - self.beta)", "= (1 - self.beta) * of_teacher + self.beta"),
        ("jsd", "slope", "JSD", "self._factor * (1 - self.beta))]", "self._factor * self.beta)]"),
        ("jsd", "normaliser", "JSD", "1 / (self.beta * (1 - self.beta))", "1 / self.beta"),
        ("jsd", "temperature factor", "JSD", "t_squared: ClassVar[bool] = True", "pass"),
        ("skew_kl", "share", "SkewKL", "_log_mixture(bins, self.alpha)", "_log_mixture(bins, 1 - self.alpha)"),
        ("skew_kl", "sign of the gradient", "SkewKL", "self.alpha - 1)]", "1 - self.alpha)]"),
        ("skew_kl", "temperature factor", "SkewKL", "t_squared: ClassVar[bool] = True", "pass"),
        ("skew_kl", "underflow", "_mixture", ".clamp_(min=_TINY)", ""),
        ("skew_reverse_kl", "sign of the mixture's part", "SkewReverseKL", "-self.alpha)]", "self.alpha)]"),
        ("skew_reverse_kl", "detached without being asked", "SkewReverseKL", "if self.detach_mixture:", "if True:"),
        ("skew_reverse_kl", "never detached", "SkewReverseKL", "detach=self.detach_mixture", "detach=False"),
        ("skew_reverse_kl", "temperature factor", "SkewReverseKL", "t_squared: ClassVar[bool] = True", "pass"),
        ("tvd", "factor", "TVD", "0.5 * (bins.p", "(bins.p"),
        ("tvd", "sign", "TVD", "bins.q - bins.p", "bins.p - bins.q"),
        ("tvd", "temperature factor", "TVD", "    zero_at_equal:", "    t_squared: ClassVar = True\n    zero_at_equal:"),
        ("alpha_beta", "swapped", "AlphaBeta", "self.beta\n        log_ratio", "self.beta\n        a, b = b, a\n        log_ratio"),
        ("alpha_beta", "sign of the direct gradient", "AlphaBeta", "(cross.sub_(student), -1 / a)", "(cross.sub_(student), 1 / a)"),
        ("alpha_beta", "sign of the gradient", "AlphaBeta", "(slope, -1.0)", "(slope, 1.0)"),
        ("alpha_beta", "divisor", "AlphaBeta", ".sum(-1) / b, slope", ".sum(-1) / a, slope"),
        ("alpha_beta", "no limit", "_quotient", "return log_power.exp() * log_ratio\n", "return log_power.exp()\n"),
        (
            "alpha_beta",
            "overflow",
            "_quotient",
            "(log_power + up).exp().mul((-up).expm1().neg()).where(exponent > 0, log_power.exp() * down.expm1()) / c",
            "log_power.exp() * exponent.expm1() / c",
        ),
    ),
    *_more(
        "logits.py",
        ("logits", "temperature once", "Logits", "self.temperature**2", "self.temperature"),
        ("logits", "1/T of the gradient", "Logits", "self._factor / self.temperature", "self._factor"),
        ("logits", "gate the wrong way", "Logits", "< math.log(", "> math.log("),
        ("logits", "gate without the gradient", "Logits", "(~self.gate(teacher, targets)).float()[:, None]", "1.0"),
        ("logits", "gate without the value", "Logits", "if self.is_gated else values", "if False else values"),
    ),
    *_more(
        "support.py",
        ("top_k", "tail of the kept", "Dense", "self.log_probs(temperature).scatter(-1, ids, -torch.inf)", "self.log_probs(temperature)"),
        ("top_k", "tail of the kept, in place", "Dense", "probs.scatter_(-1, ids, 0.0).sum", "probs.sum"),
        ("top_k", "kept tokens lost", "Dense", "            probs.scatter_(-1, ids, inside)\n", ""),
        ("sampled", "entropy of the weights", "SampledTarget", " - (weights * self._log_weights).sum(-1)", ""),
        ("sampled", "a tail", "Bins", 'teacher.kind == "top_k"', 'teacher.kind != "dense"'),
        ("top_k", "tail not renormalised at T", "TopKTarget", " + torch.log1p(-log_tail.exp())", ""),
        ("top_k", "tail's share", "Bins", "(-self.log_q[:, -1:])", "self.log_q[:, -1:]"),
        ("top_k", "tail's overflow", "Bins", ".clamp(max=_LARGEST_LOG_RATIO)", ""),
        ("top_k", "tail's gradient on the kept", "Gradient", "(-1, ids) * weight", "(-1, ids) * (weight + outside)"),
        ("top_k", "mask of the kept", "TopKTarget", "self.ids != targets[:, None], LOG_ZERO", "self.ids == targets[:, None], LOG_ZERO"),
        ("all", "normaliser's gradient", "Bins", "total * -scale", "total * scale"),
        ("all", "temperature ignored", "Dense", "self.logits / temperature", "self.logits"),
        ("all", "half precision", "Dense", "torch.log_softmax(logits.float(), dim=-1)", "torch.log_softmax(logits, dim=-1)"),
        ("all", "impossible tokens", "DenseTarget", "self.logits.clamp_(min=LOG_ZERO)", "pass"),
        ("all", "weight of a dense part", "Gradient", "alpha=weight", "alpha=1.0"),
    ),
    *_more(
        "head.py",
        ("all", "shift of targets", "_FusedHead", "targets[chunk], signal", "targets[chunk].roll(1), signal"),
        ("all", "reduction", "_block", "values.sum() for key, values in forms", "values.mean() for key, values in forms"),
        ("all", "scale", "_block", "collected, scales[key]", "collected, 1.0"),
        ("all", "only one chunk", "_FusedHead", "sums += chunk_sums", "sums = chunk_sums"),
        ("all", "only one chunk in the head's gradient", "_add_matmul", "total.addmm_(left, right)", "total"),
        ("all", "soft cap", "_block", "logits.mul_(slope)", "pass"),
        ("all", "teacher of another chunk", "_chunk", "slice(chunk.start + block.start, chunk.start + block.stop)", "block"),
    ),
    *_more(
        "ce.py",
        ("ce", "sign", "CrossEntropy", "return -student", "return student"),
        ("ce", "shift", "CrossEntropy", "grad.scatter(targets[:, None]", "grad.scatter(targets[:, None].roll(1)"),
        ("ce", "factor", "CrossEntropy", "grad.add_probs(scale)", "grad.add_probs(2 * scale)"),
    ),
    *_more(
        "mse_logits.py",
        ("mse_logits", "not centred", "MSELogits", " - difference.sum(-1, keepdim=True) / count", ""),
        ("mse_logits", "factor", "MSELogits", "2 * scale / count", "scale / count"),
        ("mse_logits", "sign", "MSELogits", "student.log_probs() - log_p", "log_p - student.log_probs()"),
        ("mse_logits", "tokens ruled out", "MSELogits", "log_p <= LOG_ZERO", "log_p < LOG_ZERO"),
    ),
    *_more(
        "ranking.py",
        ("ranking", "order", "Ranking", "_differences(log_p) > 0", "_differences(log_p) < 0"),
        ("ranking", "tail as a token", "Ranking", "[:, :-1] if", "if"),
        ("ranking", "reduction", "Ranking", "is_pair / is_pair.sum((-2, -1), keepdim=True).clamp(min=1)", "is_pair.float()"),
        ("ranking", "margin", "Ranking", "(self.margin - _differences(log_q.exp())).relu()", "(-_differences(log_q.exp())).relu()"),
        ("ranking", "sign of the hinge's gradient", "Ranking", "keepdim=True) * -scale", "keepdim=True) * scale"),
        ("ranking", "sign of the logistic gradient", "Ranking", "slope = pushes.sum(-2) - pushes", "slope = -pushes.sum(-2) + pushes"),
    ),
    *_more(
        "hidden.py",
        ("hidden", "reduction", "Hidden", "(ours - theirs).square().mean(-1)", "(ours - theirs).square().sum(-1)"),
        ("hidden", "sign", "Hidden", "1 - functional", "1 + functional"),
        ("hidden", "not normalised", "Hidden", 'self.normalize == "layer_norm"', "False"),
        ("hidden", "mean over pairs", "MappedHidden", " / len(per_pair)", ""),
        ("hidden", "half precision", "MappedHidden", "projected.float(), theirs.float()", "projected, theirs"),
    ),
    *_more(
        "published.py",
        ("hidden_as_published", "temperature factor", "HiddenAsPublished", "self.temperature**2", "self.temperature"),
        ("hidden_as_published", "width", "HiddenAsPublished", " / ours.shape[-1]", ""),
        ("hidden_as_published", "direction", "HiddenAsPublished", "(theirs, ours)", "(ours, theirs)"),
        ("hidden_as_published", "trained projection", "HiddenAsPublished", ".requires_grad_(False)", ""),
    ),
]  # fmt: skip


def run(mutant: Mutant | None) -> tuple[int, str]:
    """Exit code of the suite on a package with that change (without one: on the package as it is), and the first test that failed."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder) / "limbeck", ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            file = Path(folder) / "limbeck" / "objectives" / mutant.file
            file.write_text(mutant.apply(file.read_text(encoding="utf-8")), encoding="utf-8")
        output = Path(folder) / "output"
        child = os.fork()
        if child == 0:
            os._exit(_test(folder, output, mutant.loss if mutant else ""))
        _, status = os.waitpid(child, 0)
        failed = re.search(r"^FAILED (?:\S*::)?(.+?)(?: - .*)?$", output.read_text(encoding="utf-8"), re.MULTILINE)
        return os.waitstatus_to_exitcode(status), failed[1] if failed else ""


class _First:
    """A plugin of pytest: the cases of one loss come first, as they are likeliest to notice what is wrong with it."""

    def __init__(self, loss: str) -> None:
        self.ours = re.compile(rf"\b{loss}\b")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.ours.search(item.name) is None)


def _test(package: str, output: Path, loss: str) -> int:
    """The suite on a package in that folder, up to the first failure; in a process of its own, which must not have imported ours."""
    import pytest

    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.path.insert(0, package)
    sys.dont_write_bytecode = True
    ours = [str(Path(__file__).with_name(name)) for name in ("test_hidden_terms.py", "test_output_terms.py")]
    return int(pytest.main([*ours, "-x", "-p", "no:cacheprovider"], plugins=[_First(loss)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="a loss, or `loss: kind`")
    parser.add_argument("--unchecked", action="store_true", help="do not run the suite on the package as it is first")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not options.only or {mutant.loss, mutant.name} & set(options.only)]
    if not chosen:
        parser.error(f"no mutant is called so; losses: {', '.join(dict.fromkeys(mutant.loss for mutant in MUTANTS))}")
    import torch
    import transformers  # noqa: F401  the children find both imported

    torch.set_num_threads(1)
    code, failed = (0, "") if options.unchecked else run(None)
    if code:
        sys.exit(f"the suite fails without a change ({failed}), so it says nothing of mutants")
    survivors = []
    for mutant in chosen:
        code, failed = run(mutant)
        verdict = "killed" if code == 1 else "SURVIVED" if code == 0 else f"BROKEN ({code})"
        survivors += [mutant.name] if code != 1 else []
        print(f"| {mutant.loss} | {mutant.kind} | {verdict} | {failed[:100]} |", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
