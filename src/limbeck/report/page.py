"""The report of a study or a run: one self-contained HTML page, its Markdown twin with SVG files beside it, and JSON for programs.

A page is made once as plain data (sentences, tables, plots) and written three times. The same directory gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from limbeck.errors import RunError
from limbeck.report import plots, summary, tables, verdict_words, words
from limbeck.report.collect import Evidence, collect
from limbeck.report.judge import Judgement, forgotten, judge
from limbeck.report.plots import Plot
from limbeck.report.tables import Table, escape_markdown, to_markdown
from limbeck.run import write_json

PLOT_FOLDER = "report_files"


@dataclass(frozen=True)
class ReportPaths:
    """Where a report was written."""

    html: Path
    markdown: Path
    json: Path


@dataclass(frozen=True)
class Section:
    """A part of the page. `texts` are long texts by label, folded away."""

    title: str
    sentences: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    note: str = ""
    texts: list[tuple[str, str]] = field(default_factory=list)
    plots_first: bool = False

    @property
    def is_empty(self) -> bool:
        return not (self.sentences or self.tables or self.plots or self.texts)


@dataclass(frozen=True)
class Page:
    """All that a reader sees, in order."""

    title: str
    kind: Literal["study", "run"]
    question: str
    comparison: str
    answer: list[str]
    findings: list[tuple[str, str]]
    statement: str
    budget_sentence: str
    budgets_differ: bool
    sections: list[Section]


def build_report(path: Path | str) -> ReportPaths:
    """Write the report of the study or run in `path` into it."""
    try:
        evidence = collect(Path(path))
        page = make_page(evidence)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:  # of files that came from elsewhere, or were edited
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise RunError(f"{path}: its files are not what Limbeck writes, and no report can be made of them ({found})") from error
    paths = ReportPaths(*(evidence.path / f"report.{kind}" for kind in ("html", "md", "json")))
    _write(paths.html, to_html(page))
    shutil.rmtree(evidence.path / PLOT_FOLDER, ignore_errors=True)
    for plot in (plot for section in page.sections for plot in section.plots):
        _write(evidence.path / PLOT_FOLDER / f"{plot.key}.svg", plot.file_text())
    _write(paths.markdown, page_to_markdown(page))
    write_json(paths.json, to_json(evidence))
    return paths


def make_page(evidence: Evidence) -> Page:
    """The page of what was found."""
    differences = summary.differences(evidence)
    budgets = summary.budgets(evidence)
    budget_sentence = words.budget_sentence(budgets)
    judged = judge(evidence)
    sections = [
        *(_verdicts(evidence, judged) if judged else []),
        Section(
            "Quality",
            [sentence for sentence in (words.caution(evidence), words.optimistic_sentence(evidence)) if sentence],
            [tables.quality(evidence)] if evidence.benchmarks() else [],
            plots.quality_plots(evidence),
            "Plots show the first metric of each benchmark; bars are two standard errors over items, small ticks single seeds.",
            plots_first=True,
        ),
        Section(f"Differences from {evidence.baseline}", tables=[tables.paired(evidence, differences)] if differences else []),
        Section("What the teacher has to give", words.headroom_sentences(summary.headroom(evidence))),
        Section("Training", plots=plots.loss_plots(evidence), note=_LOSS_NOTE),
        Section("Evaluations during training", words.chosen_sentences(evidence), [], plots.evaluation_plots(evidence), _EVALUATIONS_NOTE),
        Section("Layer maps", plots=plots.layer_map_plots(evidence), note=_LAYERS_NOTE),
        _forgetting(evidence),
        Section("Learning rates", tables=[verdict_words.sweep_table(evidence)] if evidence.tuning else []),
        Section("Answers side by side", tables=[found] if (found := verdict_words.samples_table(evidence)) else []),
        Section("Cost", tables=[tables.costs(evidence)] if evidence.finished else []),
        Section(
            "Equal budgets" if evidence.is_study else "What it was trained on",
            [sentence for sentence in (budget_sentence, words.apart_sentence(evidence)) if sentence],
            [tables.equal_budgets(evidence, budgets)] if budgets else [],
        ),
        _recipes(evidence),
        _environment(evidence),
    ]
    return Page(
        title=evidence.name,
        kind="study" if evidence.is_study else "run",
        question=evidence.question,
        comparison=words.comparison(evidence),
        answer=verdict_words.headline(evidence, judged) if judged else words.answer(evidence, differences),
        findings=words.findings(evidence, differences),
        statement=words.statement(evidence, judged is not None),
        budget_sentence=budget_sentence,
        budgets_differ=any(not budget.is_equal for budget in budgets),
        sections=[section for section in sections if not section.is_empty],
    )


def _verdicts(evidence: Evidence, judged: Judgement) -> list[Section]:
    cost = plots.cost_plot(evidence, judged)
    drawn = [*([plots.verdict_plot(evidence, judged)] if judged.verdicts else []), *([cost] if cost else [])]
    return [
        Section(
            "Verdicts",
            [*verdict_words.protocol_sentences(evidence), *verdict_words.gap_sentences(judged)],
            [verdict_words.verdict_table(evidence, judged)] if judged.verdicts else [],
            drawn,
            "Dots are differences, lines their intervals; within the band, a difference is as good as none.",
            plots_first=True,
        ),
        Section("Equal compute", verdict_words.compute_sentences(evidence)),
        Section("What could be wrong", verdict_words.doubts(evidence, judged)),
    ]


def _forgetting(evidence: Evidence) -> Section:
    found = forgotten(evidence)
    return Section("Kept and forgotten", tables=[verdict_words.forgetting_table(evidence, found)] if found else [])


_LAYERS_NOTE = (
    "Before training: the larger a dot, the more alike are the states of the two blocks (linear CKA). Ringed: the pairs that are mapped."
)
_LOSS_NOTE = (
    "What was optimised, on one pair of axes for all arms: cross-entropy and divergences in nats per scored token, hidden-state distances "
    "per token, totals with their weights. Lines are means over seeds, bands their range. Teacher NLL is the teacher’s on the same tokens."
)


_EVALUATIONS_NOTE = (
    "Lines are means over seeds and bands their range, or for a single run two standard errors over items. Ringed: the evaluation whose "
    "weights became the student."
)


def to_html(page: Page) -> str:
    """One file that needs no other, with every text from data escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    css = (folder / "page.css").read_text(encoding="utf-8")
    css = css.replace("@@light@@", plots.css_variables(dark=False)).replace("@@dark@@", plots.css_variables(dark=True))
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("page.html.j2").render(page=page, css=css, version=_version())


def page_to_markdown(page: Page) -> str:
    """The twin, for repositories and terminals."""
    parts = [f"# {escape_markdown(page.title)}"]
    parts += [escape_markdown(text) for text in (page.question, page.comparison, *page.answer) if text]
    if page.findings:
        parts.append("\n".join(f"- **{escape_markdown(metric)}**: {escape_markdown(finding)}" for metric, finding in page.findings))
    parts.append(f"> {escape_markdown(page.statement)}")
    if page.budgets_differ:
        parts.append(f"> {escape_markdown(page.budget_sentence)}")
    for section in page.sections:
        parts.append(f"## {escape_markdown(section.title)}")
        parts += [escape_markdown(sentence) for sentence in section.sentences]
        for table in section.tables:
            parts += [to_markdown(table), *([escape_markdown(table.caption)] if table.caption else [])]
        images = [f"![{escape_markdown(plot.description)}]({PLOT_FOLDER}/{plot.key}.svg)" for plot in section.plots]
        titles = [f"**{escape_markdown(plot.title)}**" for plot in section.plots]
        parts += [f"{title}\n\n{image}" for title, image in zip(titles, images, strict=True)]
        parts += [escape_markdown(section.note)] if section.note else []
        parts += [f"{escape_markdown(label)}\n\n{_code_block(text)}" for label, text in section.texts]
    return "\n\n".join(parts) + "\n"


def to_json(evidence: Evidence) -> dict[str, Any]:
    """The figures, for programs."""
    differences, budgets, headroom = summary.differences(evidence), summary.budgets(evidence), summary.headroom(evidence)
    judged = judge(evidence)
    keys = [(benchmark, metric) for benchmark, metric, _ in evidence.benchmarks()]
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for label, per_seed in evidence.models():
        for benchmark, metric in keys:
            if found := summary.score(per_seed, benchmark, metric):
                models.setdefault(label, {}).setdefault(benchmark, {})[metric] = asdict(found)
    return {
        "format": "limbeck-report",
        "version": 1,
        "kind": "study" if evidence.is_study else "run",
        "name": evidence.name,
        "question": evidence.question,
        "seeds": evidence.seeds,
        "num_runs": {"expected": evidence.num_expected, "finished": evidence.num_finished},
        "statement": words.statement(evidence, judged is not None),
        "answer": verdict_words.headline(evidence, judged) if judged else words.answer(evidence, differences),
        "judgement": judged.to_json() if judged else None,
        "protocol": {"sha256": evidence.protocol.get("sha256"), "amendments": [its["changes"] for its in evidence.amendments]},
        "tuning": evidence.tuning,
        "forgotten": [asdict(its) for its in forgotten(evidence)],
        "findings": dict(words.findings(evidence, differences)),
        "metrics": {f"{b}/{m}": {k: example.get(k) for k in ("higher_is_better", "chance")} for b, m, example in evidence.benchmarks()},
        "scores": models,
        "baseline": evidence.baseline,
        "differences": [asdict(difference) for difference in differences],
        "costs": {arm: summary.cost(runs) for arm, runs in evidence.finished.items()},
        "equal_compute": [asdict(its) for its in summary.equal_compute(evidence)],
        "captures": evidence.captures,
        **({"chosen": chosen} if (chosen := summary.chosen(evidence)) else {}),
        "budgets": {
            "equal": all(budget.is_equal for budget in budgets) if budgets else None,
            "statement": words.budget_sentence(budgets),
            "by_seed": [{**asdict(budget), "equal": budget.is_equal} for budget in budgets],
        },
        "headroom": [asdict(its) | {"is_there": its.is_there} for its in headroom],
        "recipes": evidence.recipes,
    }


def _recipes(evidence: Evidence) -> Section:
    import yaml

    texts = [(f"Recipe of {arm}", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)) for arm, recipe in evidence.recipes.items()]
    several = len(evidence.recipes) > 1
    return Section("Recipes" if several else "Recipe", tables=[tables.changes(evidence)] if several else [], texts=texts)


def _environment(evidence: Evidence) -> Section:
    found = [run.environment for runs in evidence.arms.values() for run in runs if run.environment]
    if not found:
        return Section("Environment")
    stripped = [{key: value for key, value in environment.items() if key != "command"} for environment in found]
    first = dict(stripped[0])
    packages = ", ".join(f"{name} {version}" for name, version in first.pop("packages", {}).items())
    sentence = f"{', '.join(f'{tables.words(key)} {value}' for key, value in first.items())}. {packages}."
    note = (
        "" if all(other == stripped[0] for other in stripped) else "NOT all runs were made in this environment: see their environment.json."
    )
    return Section("Environment", [sentence], note=note)


def _code_block(text: str) -> str:
    """Indented, so that nothing in the text can end it."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _version() -> str:
    from importlib import metadata

    return metadata.version("limbeck")


def _write(file: Path, text: str) -> None:
    """A reader sees the old file or the whole new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(file)
