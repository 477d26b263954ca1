"""The sentences and tables of a judgement: what was decided, by what was declared, whether the study may be believed, and what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.report.collect import Evidence, item_pairs
from limbeck.report.judge import Forgotten, Judgement
from limbeck.report.summary import cost_terms, equal_compute
from limbeck.report.tables import Cell, Column, Numbers, Row, Table, words
from limbeck.report.verdict import Verdict
from limbeck.report.words import listing, plural

STATES = {
    "sound": "The study checks out: its A/A control leads by no more than chance, and its planted handicap was found.",
    "void": "THIS STUDY IS VOID: the same arm with other seeds is told from itself, so what is said here of other arms can't be trusted.",
    "powerless": (
        "This study had no power: a handicap that is known to be there was not found, so arms that are not told apart may still differ."
    ),
    "unchecked": "The study's checks of itself are not there yet: they need both controls with two seeds or more.",
}


def headline(evidence: Evidence, judged: Judgement) -> list[str]:
    """The answer in a sentence per outcome, most decisive first."""
    name = f"{words(judged.benchmark)} {words(judged.metric)}"
    by_outcome: dict[str, list[str]] = {}
    for (arm, other), its in judged.verdicts.items():
        terms = " ".join(filter(None, [other, cost_terms(evidence, arm, other)]))
        by_outcome.setdefault(its.outcome, []).append(f"{arm} {_verb(its)} {terms} ({_difference(its)})")
    order = ("BEATS", "LOSES", "TIES", "INCONCLUSIVE", "NO VERDICT")
    sentences = [f"On {name}: {'; '.join(by_outcome[outcome])}." for outcome in order if outcome in by_outcome]
    if judged.lacking:
        pairs = listing([f"{arm} and {other}" for arm, other in judged.lacking])
        sentences.append(f"Not judged yet, as runs are missing: {pairs}.")
    if judged.state == "void":
        return [STATES["void"], *sentences]
    return [*sentences, STATES[judged.state]]


def _verb(its: Verdict) -> str:
    return {
        "BEATS": "BEATS",
        "LOSES": "LOSES to",
        "TIES": "TIES with",
        "INCONCLUSIVE": "is NOT TOLD from",
        "NO VERDICT": "gets NO VERDICT against",
    }[its.outcome]


def _difference(its: Verdict) -> str:
    numbers = Numbers([its.value])
    between = f" [{numbers.show(its.interval[0], True)}, {numbers.show(its.interval[1], True)}]" if its.interval else ""
    return f"{numbers.show(its.value, True)}{between}"


def protocol_sentences(evidence: Evidence) -> list[str]:
    """What was declared before the first run, and everything that was changed since; the last declaration is the one that judges."""
    sentences = [f"Declared before the first run: {_declared(evidence.protocol)}."]
    for amendment in evidence.amendments:
        sentences.append(f"AMENDED after runs were made: {'; '.join(amendment['changes'])}.")
    if evidence.amendments:
        sentences.append(f"Judged by the last declaration: {_declared(evidence.judged)}.")
    if planted := evidence.judged["primary"].get("planted"):
        sentences.append(f"The planted handicap: {_flat(planted)}.")
    return sentences


def _declared(protocol: dict[str, Any]) -> str:
    """The metric and how it decides, seeds, grid and hash of a declaration."""
    primary, compared, tune = protocol.get("primary"), protocol["compared"], protocol.get("tune")
    if not primary:
        return "no metric that decides"
    seeds = max(len(its) for its in protocol["seeds"].values())
    rates = f", learning rates to choose from {listing([f'{rate:g}' for rate in tune['learning_rates']])}" if tune else ""
    return (
        f"primary metric {words(primary['benchmark'])} {words(primary['metric']) or 'by its first metric'}, margin {primary['margin']:g}, "
        f"alpha {primary['alpha']:g} over {len(compared)} {plural('comparison', len(compared))} (Holm), {seeds} {plural('seed', seeds)}, "
        f"every recipe{rates}; hash {protocol['sha256'][:16]}"
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> str:
    parts = [_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else f"{prefix}{key} {value}" for key, value in tree.items()]
    return ", ".join(parts)


def verdict_table(evidence: Evidence, judged: Judgement) -> Table:
    """A row per comparison, controls last."""
    rows = [
        _verdict_row(f"{arm} − {other}", its, "; ".join(filter(None, [cost_terms(evidence, arm, other), its.why])))
        for (arm, other), its in judged.verdicts.items()
    ]
    for its, role, meaning in (
        (judged.again, "again", "A/A control: must not lead; its seeds are its own, so no two runs are paired"),
        (judged.planted, "planted", "planted handicap: must lose"),
    ):
        if its is not None:
            rows.append(_verdict_row(f"{evidence.of_role(role)} − {evidence.baseline}", its, meaning, True))
    columns = [
        Column("verdict"),
        Column("difference"),
        Column("p", note="of no difference, after Holm"),
        Column("p", note="of more than the margin, after Holm"),
        Column("seeds × items"),
        Column("finds", note="with a chance of 0.8"),
        Column("would be settled by"),
    ]
    caption = (
        f"Intervals are {1 - judged.alpha:.0%}, over seeds and items, each comparison on its own; p-values over all of them decide. "
        f"TIES: within ±{judged.margin:g}."
    )
    return Table("comparison", columns, rows, caption, is_numeric=False)


def _verdict_row(label: str, its: Verdict, note: str = "", is_reference: bool = False) -> Row:
    settle = [f"{n} {kind}" for n, kind in ((its.seeds_needed, "seeds"), (its.items_needed, "items")) if n]
    needed = " or ".join(settle) or ("neither more seeds nor more items alone" if its.outcome == "INCONCLUSIVE" else "–")
    p_better = its.adjusted_better if its.adjusted_better is not None else its.mcnemar.p if its.mcnemar else None
    return Row(
        label,
        [
            Cell(its.outcome),
            Cell(_difference(its)),
            Cell(_p(p_better), "McNemar, one seed" if its.num_seeds == 1 and its.mcnemar else ""),
            Cell(_p(its.adjusted_ties)),
            Cell(f"{its.num_seeds} × {its.num_items}"),
            Cell(f"±{its.detectable:.3f}" if its.detectable is not None else "–"),
            Cell(needed),
        ],
        note or its.why,
        is_reference,
    )


def compute_sentences(evidence: Evidence) -> list[str]:
    """What the baseline was given to cost as much as an arm, and where it took that from."""
    sentences = []
    for its in equal_compute(evidence):
        costs = [f"{value / 1e12:,.1f}" if value is not None else "unknown" for value in (its.other_flops, its.flops)]
        seen = ""
        if its.passes is not None and its.passes <= 1:
            seen = f": rows that it had not seen, {its.passes:.0%} of the data"
        elif its.passes is not None:
            seen = f": the data has no more rows, and comes {its.passes:.1f} times"
        sentences.append(f"{its.other} takes {costs[0]} TFLOPs and {its.arm} {costs[1]}, by {its.steps or 0:,.0f} steps{seen}.")
    return sentences


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def gap_sentences(judged: Judgement) -> list[str]:
    """How much of the way to the teacher each arm goes."""
    known = {arm: gap for arm, gap in judged.gaps.items() if gap.value is not None and gap.interval}
    shares = [f"{arm} {gap.value:.0%} [{gap.interval[0]:.0%}, {gap.interval[1]:.0%}]" for arm, gap in known.items() if gap.interval]
    reasons = dict.fromkeys(gap.reason for gap in judged.gaps.values() if gap.value is None)
    return ([f"Share of the gap between the baseline and the teacher that an arm recovers: {listing(shares)}."] if shares else []) + [
        f"The share of the gap recovered is not given: {reason}." for reason in reasons
    ]


def forgetting_table(evidence: Evidence, found: Sequence[Forgotten]) -> Table:
    """What the student could do before, and what is left of it."""
    tasks = list(dict.fromkeys((its.benchmark, its.metric, its.before, its.num_items) for its in found))
    arms = list(dict.fromkeys(its.arm for its in found))
    by_key = {(its.benchmark, its.arm): its for its in found}
    rows = []
    for arm in arms:
        cells = []
        for benchmark, _, before, _ in tasks:
            its = by_key.get((benchmark, arm))
            cells.append(Cell(f"{its.kept:.1f} of {before} kept", f"+ {its.gained:.1f} new") if its else Cell("–"))
        rows.append(Row(arm, cells))
    columns = [Column(words(benchmark), note=f"{before} of {num_items} right before training") for benchmark, _, before, num_items in tasks]
    return Table("arm", columns, rows, "Items, means over seeds: right before training and still right, and right that were not.")


def sweep_table(evidence: Evidence) -> Table:
    """Validation scores of the learning rates that were tried."""
    rates = sorted({float(rate) for its in evidence.tuning.values() for rate in its["tried"]})
    rows = []
    for arm, its in evidence.tuning.items():
        numbers = Numbers(list(its["tried"].values()))
        tried = {float(rate): value for rate, value in its["tried"].items()}
        rows.append(Row(arm, [Cell(numbers.show(tried.get(rate)), "chosen" if rate == its["chosen"] else "") for rate in rates]))
    benchmark = (evidence.judged.get("tune") or {}).get("evaluate", {})
    name = words(benchmark.get("name") or benchmark.get("type", "validation"))
    return Table("arm", [Column(f"{rate:g}") for rate in rates], rows, f"On {name}, which no test uses. Controls take the baseline’s rate.")


def samples_table(evidence: Evidence, limit: int = 6) -> Table | None:
    """The same questions answered by everyone, where answers may be shown."""
    for benchmark, metric, _ in evidence.headlines():
        shown = {label: _answers(per_seed[0], benchmark) for label, per_seed in evidence.models()}
        shown = {label: answers for label, answers in shown.items() if answers}
        if not shown:
            continue
        first = next(iter(shown.values()))
        ids = [item for item in first if all(item in answers for answers in shown.values())][:limit]
        rows = []
        for item in ids:
            detail = first[item]
            expected = str(detail.get("expected", ""))
            cells = [Cell(_brief(str(answers[item].get("text", "")))) for answers in shown.values()]
            rows.append(Row(_brief(str(detail.get("question", item)), 160), cells, f"expected: {_brief(expected)}"))
        if rows:
            caption = f"{words(benchmark)} {words(metric)}, the first seed of every arm; the first questions by their ids."
            return Table("question", [Column(label) for label in shown], rows, caption, is_numeric=False)
    return None


def _answers(evals: dict[str, dict[str, Any]], benchmark: str) -> dict[str, dict[str, Any]]:
    items = evals.get(benchmark, {}).get("items", [])
    return {item["id"]: item["detail"] for item in items if item.get("detail", {}).get("text") is not None}


def _brief(text: str, limit: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def doubts(evidence: Evidence, judged: Judgement) -> list[str]:
    """What could be wrong with this study, from what is known of it."""
    found = []
    num_items = max((its.num_items for its in judged.verdicts.values()), default=0)
    chance = next((e.get("chance") for b, m, e in evidence.benchmarks() if (b, m) == (judged.benchmark, judged.metric)), None)
    values = {label: _mean_of(per_seed, judged) for label, per_seed in evidence.models()}
    arms = {label: value for label, value in values.items() if value is not None and label in evidence.recipes}
    floor = chance or 0.0
    if arms and judged.higher_is_better and max(arms.values()) - floor < 0.05:
        found.append(f"No arm is more than 0.05 above {'chance' if chance else 'zero'}: at the floor, arms cannot be told apart.")
    if arms and judged.higher_is_better and min(arms.values()) > 0.95:
        found.append("Every arm is above 0.95: at the ceiling, arms cannot be told apart.")
    seeds = {len(runs) for runs in evidence.finished.values()}
    if len(seeds) > 1:
        found.append("Arms have different numbers of seeds: a comparison uses the first seeds that both have.")
    models = {str(recipe.get("student", {}).get("model")) for recipe in evidence.recipes.values()}
    found.append(
        f"One {'pair of models' if len(evidence.teachers) == 1 else 'student'}, one data set and one budget: verdicts hold for "
        f"{listing(sorted(models))} trained like this on such items, of which {num_items} were asked."
    )
    if evidence.amendments:
        found.append("What decides was changed after runs had been made; a reader may want the first declaration’s outcome.")
    if not evidence.tuning:
        found.append("All arms train at the learning rate of their recipe; another might favour another arm.")
    return found


def _mean_of(per_seed: Sequence[dict[str, dict[str, Any]]], judged: Judgement) -> float | None:
    found = [pairs for evals in per_seed if (pairs := item_pairs(evals, judged.benchmark, judged.metric))]
    values = [sum(total for total, _ in its.values()) / max(sum(count for _, count in its.values()), 1e-12) for its in found]
    return sum(values) / len(values) if values else None
