"""The sentences of a report. They describe what was measured and say what it does not show; no verdict is claimed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.report.collect import Evidence, terms
from limbeck.report.summary import BUDGETS, Budget, Difference, Headroom, chosen, score
from limbeck.report.tables import Numbers, metric_name, words

OPTIMISED = {"ce": "the likelihood of the data’s tokens", "logits": "closeness to the teacher’s distribution"}


def comparison(evidence: Evidence) -> str:
    """What was compared, in a sentence."""
    arms = [f"{arm} ({evidence.method(arm)})" for arm in evidence.recipes]
    if not evidence.is_study:
        return f"One run: {arms[0]}, seed {evidence.seeds[0]}."
    tokens = [run.totals["tokens"] for runs in evidence.finished.values() for run in runs if "tokens" in run.totals]
    budget = ""
    if tokens and len(set(tokens)) == 1:
        budget = f" on {tokens[0]:,} tokens each"
    elif tokens:
        budget = f" on {min(tokens):,} to {max(tokens):,} tokens"
    seeds = "one seed" if len(evidence.seeds) == 1 else f"{len(evidence.seeds)} seeds"
    return f"The same student, trained in {number(len(arms))} {plural('way', len(arms))}{budget}, {seeds}: {listing(arms)}."


def statement(evidence: Evidence, is_judged: bool = False) -> str:
    """What the evidence allows to be said, and what not."""
    unfinished = evidence.num_expected - evidence.num_finished
    prefix = f"{unfinished} of {evidence.num_expected} runs have not finished; this report covers the others. " if unfinished else ""
    finished = max((len(runs) for runs in evidence.finished.values()), default=0)
    if not evidence.is_study:
        return prefix + "A single run: its standard errors are over items, and there is nothing it is compared with."
    if finished <= 1:
        return prefix + (
            "One seed: the standard errors are over items. They say how these trained students would do on other items of the same kind, "
            "and nothing about how another seed would turn out. So there is no verdict across seeds."
        )
    return prefix + (
        f"{finished} seeds: means and standard deviations over seeds, standard errors over items. "
        + (
            "Verdicts take both into account, on the metric that was declared; everything else here describes."
            if is_judged
            else "No primary metric was declared, so no verdict is claimed."
        )
    )


def answer(evidence: Evidence, found: Sequence[Difference]) -> list[str]:
    """The shortest account of what was measured beside the baseline: tasks first, then likeness on held-out text."""
    sentences = []
    for where, is_text in (("On tasks", False), ("On held-out text", True)):
        # no item on which two arms differ: at the floor or the ceiling, where nothing can be seen
        here = [d for d in found if evidence.is_text(d.benchmark) == is_text and d.direction != "unknown" and d.stderr]
        if here:
            names = listing([words(name) for name in dict.fromkeys(d.benchmark for d in here)])
            arms_by_claim: dict[str, list[str]] = {}
            for arm in dict.fromkeys(d.arm for d in here):
                arms_by_claim.setdefault(_claim([d for d in here if d.arm == arm], evidence.baseline or ""), []).append(arm)
            claims = [f"{listing(arms)} {'is' if len(arms) == 1 else 'are'} {claim}" for claim, arms in arms_by_claim.items()]
            sentences.append(f"{where} ({names}): {'; '.join(claims)}.")
    return sentences


def _claim(found: Sequence[Difference], baseline: str) -> str:
    """`better than sft on three of four metrics and worse on one`, by more than two standard errors over items."""
    total, metrics = number(len(found)), plural("metric", len(found))
    better, worse = (sum(d.direction == direction for d in found) for direction in ("better", "worse"))
    if better:
        return f"better than {baseline} on {number(better)} of {total} {metrics}" + (f" and worse on {number(worse)}" if worse else "")
    if worse:
        return f"worse than {baseline} on {number(worse)} of {total} {metrics}"
    on_all = {1: "", 2: " on both metrics"}.get(len(found), f" on all {total} metrics")
    return f"within two standard errors of {baseline}{on_all}"


def findings(evidence: Evidence, found: Sequence[Difference]) -> list[tuple[str, str]]:
    """(metric, where the arms stand beside the baseline) by the first metric of each benchmark. Of the one that decides, verdicts speak."""
    decides = (evidence.judged.get("primary") or {}).get("benchmark")
    return [
        (metric_name(benchmark, metric, example), sentence)
        for benchmark, metric, example in evidence.headlines()
        if benchmark != decides
        and (sentence := _finding(evidence, example, [d for d in found if (d.benchmark, d.metric) == (benchmark, metric)]))
    ]


def _finding(evidence: Evidence, example: dict[str, Any], found: Sequence[Difference]) -> str:
    """`logits (1.37) is better than sft (2.63); hidden (2.61) is within two standard errors of sft.`"""
    if not found or evidence.baseline is None:
        return ""
    benchmark, metric = found[0].benchmark, found[0].metric
    scores = {arm: score([run.evals for run in runs], benchmark, metric) for arm, runs in evidence.finished.items()}
    values = {arm: its.value for arm, its in scores.items() if its and its.value is not None}
    if evidence.baseline not in values:
        return ""
    numbers = Numbers(list(values.values()))
    if len(set(values.values())) == 1 and all(its is None or not its.stderr for its in scores.values()):
        return f"Every arm scores {numbers.show(values[evidence.baseline])} on every item: this benchmark cannot tell them apart."
    base = f"{evidence.baseline} ({numbers.show(values[evidence.baseline])})"
    parts: list[str] = []
    for direction, claim in (
        ("better", "better than"),
        ("worse", "worse than"),
        ("level", "within two standard errors of"),
        ("unknown", "beside"),
    ):
        arms = sorted((d for d in found if d.direction == direction), key=lambda d: values[d.arm], reverse=example["higher_is_better"])
        if arms:
            named = listing([f"{d.arm} ({numbers.show(values[d.arm])})" for d in arms])
            verb = "is" if len(arms) == 1 else "are"
            doubt = " (the error of this difference is not known)" if direction == "unknown" else ""
            parts.append(f"{named} {verb} {claim} {base if not parts else evidence.baseline}{doubt}")
    chance = example.get("chance")
    above = [its for its in scores.values() if its and its.value is not None and its.value - (chance or 0) > 2 * (its.stderr or 0)]
    return f"{'; '.join(parts)}." + (
        f" No arm is above chance ({chance:.3g}) by more than that." if chance is not None and not above else ""
    )


def caution(evidence: Evidence) -> str:
    """Which arm is measured on what it was trained for."""
    trained = {kind: [arm for arm, recipe in evidence.recipes.items() if kind in [t["type"] for t in terms(recipe)]] for kind in OPTIMISED}
    parts = [f"{listing(arms)} {'trains' if len(arms) == 1 else 'train'} for {OPTIMISED[kind]}" for kind, arms in trained.items() if arms]
    has_text = any(evidence.is_text(benchmark) for benchmark, _, _ in evidence.benchmarks())
    if not evidence.is_study or len(parts) < 2 or not has_text:
        return ""
    return f"Read agreement and likelihood with care: {'; '.join(parts)}. Neither can say which student is the better one."


def chosen_sentences(evidence: Evidence) -> list[str]:
    """Which of the students that evaluations saw became an arm's, and by what."""
    sentences = []
    for arm, found in chosen(evidence).items():
        by = " ".join(words(part) for part in dict.fromkeys((found[0]["benchmark"], found[0]["metric"])))
        steps = listing([f"{best['step']:,}" for best in found])
        unlearned = sum(best["step"] == 0 for best in found)
        sentences.append(
            f"{'The student' if not evidence.is_study else arm}: weights after step {steps}, chosen by {by}."
            + (" After step 0 nothing is learned yet: by this metric training did harm." if unlearned else "")
        )
    return sentences


def optimistic_sentence(evidence: Evidence) -> str:
    """Scores that are too good, because they chose."""
    names = {words(found[0]["benchmark"]): None for found in chosen(evidence).values()}
    if not names:
        return ""
    students = "Students were" if evidence.is_study else "The student was"
    return (
        f"{students} chosen during training by {listing(list(names))}. Scores on what chose are the best of several, and too good: "
        "judge by other cases."
    )


def headroom_sentences(found: Sequence[Headroom]) -> list[str]:
    """Whether the teacher has anything to give on these data, by its own likelihood; held-out text, where there is any, decides."""
    if not found:
        return []
    measured = [
        f"{its.where}, {its.name} {its.teacher:.2f}; {', '.join(f'{arm} {value:.2f}' for arm, value in its.students.items())}."
        for its in found
    ]
    verdict = (
        "The teacher predicts these data better than every student does: there is something to learn from it."
        if found[0].is_there
        else f"The teacher does not predict these data better than {found[0].nearest} does: where that is so, distillation is not expected "
        "to beat fine-tuning."
    )
    return [verdict, "Negative log-likelihood in nats per scored token. " + " ".join(measured)]


def budget_sentence(found: Sequence[Budget]) -> str:
    """Equal or not, and which arm differs in what."""
    asked: dict[tuple[str, ...], list[str]] = {}
    for budget in found:
        if budget.seed == found[0].seed and len(budget.values) > 1:
            asked.setdefault(tuple(budget.values), []).append(BUDGETS[budget.field])
    if not asked:
        return ""
    seeds = len({budget.seed for budget in found})
    scope = "in every seed" if seeds > 1 else "for this seed"
    unequal = [budget for budget in found if not budget.is_equal]
    if not unequal:
        most = max(asked, key=len)
        same = [f"{'all arms' if who == most else listing(who)} had the same {listing(what)}" for who, what in asked.items()]
        return f"Budgets are equal: {'; '.join(same)} {scope}."
    where = [f"{BUDGETS[budget.field]}" + (f" (seed {budget.seed})" if seeds > 1 else "") + f": {_odd_ones(budget)}" for budget in unequal]
    return f"Budgets are NOT equal. {'; '.join(where)}. A difference between such arms may come from that alone."


def apart_sentence(evidence: Evidence) -> str:
    """The arms that have another budget because the study says so."""
    if not evidence.apart:
        return ""
    arms = listing([f"{arm} ({', '.join(keys)})" for arm, keys in evidence.apart.items()])
    return f"By declaration these have another budget, which the table of costs shows: {arms}."


def _odd_ones(budget: Budget) -> str:
    """The arms that differ from the first, or what is missing."""
    if missing := [arm for arm, value in budget.values.items() if value is None]:
        return f"not recorded for {listing(missing)}"
    first, value = next(iter(budget.values.items()))
    return f"{listing([arm for arm, other in budget.values.items() if other != value])} differs from {first}"


def listing(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def number(count: int) -> str:
    """Small numbers in letters."""
    return ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")[count] if count < 10 else str(count)


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
