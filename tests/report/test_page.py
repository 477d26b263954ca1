"""The report is made from files alone: what it says, that it needs nothing else, and that no text from data becomes markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fake
import pytest

from limbeck.errors import RunError
from limbeck.report.page import build_report

HOSTILE = """<script>alert("x")</script> 'q' & | `b` $x$ ![i](javascript:a) </style> --> {{ 7*7 }}"""


class Elements(HTMLParser):
    """All start tags with their attributes, and the text outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def read(path: Path) -> tuple[str, str, dict[str, Any]]:
    paths = build_report(path)
    return paths.html.read_text(), paths.markdown.read_text(), json.loads(paths.json.read_text())


def test_one_seed_gives_no_verdict(tmp_path):
    html, markdown, figures = read(fake.study(tmp_path / "s"))
    for text in (Elements(html).text, markdown, figures["statement"]):
        assert "One seed: the standard errors are over items." in text
        assert "no verdict across seeds" in text
    assert figures["seeds"] == [0] and figures["num_runs"] == {"expected": 3, "finished": 3}


def test_several_seeds_give_mean_and_sd_and_no_verdict(tmp_path):
    html, markdown, figures = read(fake.study(tmp_path / "s", seeds=(0, 1, 2)))
    for text in (Elements(html).text, markdown, figures["statement"]):
        assert "3 seeds: means and standard deviations over seeds" in text and "no verdict is claimed" in text
        assert "One seed" not in text
    values = [fake.result("piqa", "sft", seed)["metrics"]["accuracy"]["value"] for seed in (0, 1, 2)]
    score = figures["scores"]["sft"]["piqa"]["accuracy"]
    assert score["value"] == pytest.approx(sum(values) / 3)
    assert score["sd"] == pytest.approx((sum((v - sum(values) / 3) ** 2 for v in values) / 2) ** 0.5)
    assert score["num_seeds"] == 3
    assert f"{score['value']:.3f} sd {score['sd']:.3f}" in markdown


def test_main_table_has_every_model_and_metric(tmp_path):
    html, markdown, figures = read(fake.study(tmp_path / "s"))
    head, _, *rows = [line for line in markdown.split("## Quality")[1].split("## ")[0].splitlines() if line.startswith("|")]
    assert [row.split("|")[1].split("<br>")[0].strip() for row in rows] == ["teacher", "untrained", "sft", "logits", "hidden"]
    assert all(text in head for text in ("kl ↓", "top1 ↑", "bits per byte ↓", "48 items, chance 0.5"))
    metric = fake.result("agreement", "logits")["metrics"]["kl"]
    cell = f"{metric['value']:.3f} ± {metric['stderr']:.3f}"
    assert cell in markdown and cell in Elements(html).text
    assert set(figures["scores"]) == {"teacher", "untrained", "sft", "logits", "hidden"}


def test_differences_are_paired_against_fine_tuning(tmp_path):
    _, markdown, figures = read(fake.study(tmp_path / "s"))
    assert figures["baseline"] == "sft"
    found = {(d["arm"], d["benchmark"], d["metric"]): d for d in figures["differences"]}
    kl = found["logits", "agreement", "kl"]
    means = [fake.result("agreement", arm)["metrics"]["kl"] for arm in ("logits", "sft")]
    assert kl["value"] == pytest.approx(means[0]["value"] - means[1]["value"])
    assert 0 < kl["stderr"] < min(m["stderr"] for m in means)  # the items that are hard are hard for both
    assert kl["direction"] == "better" and kl["num_items"] == 48
    assert found["hidden", "piqa", "accuracy"]["direction"] == "level"
    assert "over items, one seed" in markdown


def test_answer_puts_tasks_before_what_arms_optimise(tmp_path):
    html, markdown, figures = read(fake.study(tmp_path / "s"))
    assert figures["answer"] == [
        "On tasks (piqa): logits and hidden are within two standard errors of sft.",
        "On held-out text (agreement and bits per byte): logits is better than sft on three of three metrics; "
        "hidden is better than sft on two of three metrics.",
    ]
    assert all(sentence in Elements(html).text and sentence in markdown for sentence in figures["answer"])


def test_an_arm_at_chance_is_said_to_be_there(tmp_path):
    path = fake.study(tmp_path / "s")
    assert "above chance" not in read(path)[1]
    for file in path.glob("arms/*/seed-0/evals/piqa.json"):
        result = json.loads(file.read_text())
        result["metrics"]["accuracy"] |= {"value": 0.55, "stderr": 0.06}
        fake.write_json(file, result)
    assert "No arm is above chance (0.5) by more than that." in read(path)[2]["findings"]["piqa: accuracy\N{NO-BREAK SPACE}↑"]


def test_a_benchmark_at_the_floor_tells_nothing(tmp_path):
    path = fake.study(tmp_path / "s")
    for file in path.glob("arms/*/seed-0/evals/piqa.json"):
        result = json.loads(file.read_text())
        result["metrics"]["accuracy"] |= {"value": 0.0, "stderr": 0.0, "chance": None}
        for item in result["items"]:
            item["sums"]["accuracy"] = 0.0
        fake.write_json(file, result)
    _, _, figures = read(path)
    assert "Every arm scores 0.000 on every item: this benchmark cannot tell them apart." in figures["findings"].values()
    assert not any("tasks" in sentence for sentence in figures["answer"])


def test_results_of_another_version_are_not_compared(tmp_path):
    path = fake.study(tmp_path / "s")
    file = path / "arms" / "logits" / "seed-0" / "evals" / "agreement.json"
    fake.write_json(file, json.loads(file.read_text()) | {"version": 2})
    _, _, figures = read(path)
    compared = {(d["arm"], d["benchmark"]) for d in figures["differences"]}
    assert ("logits", "agreement") not in compared and ("hidden", "agreement") in compared and ("logits", "piqa") in compared


@pytest.mark.parametrize("field", ["initial_weights_sha256", "order_sha256", "data_sha256"])
def test_budgets(tmp_path, field):
    path = fake.study(tmp_path / "s")
    html, markdown, figures = read(path)
    assert figures["budgets"]["equal"] is True
    assert "Budgets are equal: all arms" in markdown and "NOT equal" not in html
    fake.run(path / "arms" / "hidden" / "seed-0", "hidden", **{field: "c" * 64})
    html, markdown, figures = read(path)
    assert figures["budgets"]["equal"] is False
    label = {"initial_weights_sha256": "initial weights", "order_sha256": "order of the data", "data_sha256": "tokens of the data"}[field]
    for text in (Elements(html).text, markdown):
        assert f"Budgets are NOT equal. {label}: hidden differs from sft" in text and "Budgets are equal" not in text


def test_budget_that_was_not_recorded_is_not_called_equal(tmp_path):
    path = fake.study(tmp_path / "s")
    for arm in ("sft", "logits", "hidden"):
        fake.run(path / "arms" / arm / "seed-0", arm, order_sha256=None)
    _, markdown, figures = read(path)
    assert figures["budgets"]["equal"] is False and "order of the data: not recorded for sft, logits and hidden" in markdown


def test_token_counts_are_part_of_the_budget(tmp_path):
    path = fake.study(tmp_path / "s", seeds=(0, 1))
    file = path / "arms" / "logits" / "seed-1" / "run.json"
    fake.write_json(file, json.loads(file.read_text()) | {"tokens": 9_999})
    _, markdown, _ = read(path)
    assert "NOT equal. tokens trained on (seed 1): logits differs from sft" in markdown
    assert "| order of the data | one per seed | one per seed | one per seed | equal in 2 seeds |" in markdown


def test_headroom_says_when_the_teacher_has_nothing_to_give(tmp_path):
    path = fake.study(tmp_path / "s")
    assert "there is something to learn from it" in read(path)[1]
    for arm in ("logits", "hidden"):
        file = path / "arms" / arm / "seed-0" / "metrics.jsonl"
        rows = [json.loads(line) | {"teacher_nll": 3.86} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, markdown, figures = read(path)
    assert figures["headroom"][0]["teacher"] == pytest.approx(3.86) and figures["headroom"][0]["is_there"] is False
    assert "distillation is not expected to beat fine-tuning" in markdown and "something to learn" not in markdown


@pytest.mark.parametrize("other", [{"source": {"type": "dataset", "data": "other"}}, {"train": {"steps": 3}}])
def test_headroom_in_training_is_over_the_same_tokens(tmp_path, other):
    """The last steps of an arm that sees other batches are no match for the teacher's."""
    path = fake.study(tmp_path / "s")
    tree = json.loads((path / "study.json").read_text())
    tree["recipes"]["hidden"] |= other
    fake.write_json(path / "study.json", tree)
    assert list(read(path)[2]["headroom"][0]["students"]) == ["sft", "logits"]


def test_steps_that_a_record_left_out_are_not_counted_as_there(tmp_path):
    path = fake.study(tmp_path / "s")
    for file in path.glob("arms/*/*/metrics.jsonl"):
        rows = [line for line in file.read_text().splitlines() if json.loads(line)["step"] % 3 == 0]
        file.write_text("".join(line + "\n" for line in rows))
    kept = len(rows) // 4
    assert kept > 1 and f"In {kept} of the last {3 * kept - 2} training steps, teacher" in read(path)[1]


def test_headroom_on_held_out_text_goes_first(tmp_path):
    """Training loss is low on what was seen often; held-out text decides whether there is something to learn."""
    path = fake.study(tmp_path / "s")
    for file in path.glob("arms/*/seed-0/evals/agreement.json"):
        result = json.loads(file.read_text())
        nll = result["metrics"]["kl"] | {"value": 1.5}
        fake.write_json(file, result | {"metrics": result["metrics"] | {"nll": nll, "teacher_nll": nll | {"value": 2.25}}})
    _, markdown, figures = read(path)
    assert [its["is_there"] for its in figures["headroom"]] == [False, True]
    assert "On 48 held-out conversations (agreement), teacher 2.25; sft 1.50, logits 1.50, hidden 1.50." in markdown
    assert "does not predict these data better than sft" in markdown
    assert "agreement/nll" in figures["metrics"] and "agreement/teacher_nll" not in figures["metrics"]


def test_every_text_from_data_is_escaped(tmp_path):
    path = fake.study(tmp_path / "s", name=HOSTILE, question=HOSTILE)
    for folder in [*(path / "arms").glob("*/seed-0"), *(path / "references").glob("*")]:
        result = json.loads((folder / "evals" / "piqa.json").read_text())
        result["metrics"][HOSTILE] = result["metrics"]["accuracy"]
        result["items"][0] |= {"id": HOSTILE, "detail": {"answer": HOSTILE}}
        fake.write_json(folder / "evals" / f"{HOSTILE.replace('/', '')[:80]}.json", result | {"name": HOSTILE})
    for file in path.glob("arms/*/seed-0/environment.json"):
        fake.write_json(file, {"platform": HOSTILE, "packages": {HOSTILE: HOSTILE}})
    study = json.loads((path / "study.json").read_text())
    for recipe in study["recipes"].values():
        recipe["source"]["data"] = HOSTILE
    study["recipes"]["sft"]["train"][HOSTILE] = HOSTILE
    fake.write_json(path / "study.json", study)
    html, markdown, _ = read(path)
    elements = Elements(html)
    assert elements.names <= Elements(read(fake.study(tmp_path / "plain"))[0]).names
    assert HOSTILE in elements.text
    assert all(not name.startswith("on") for _, attributes in elements.tags for name in attributes)
    outside_of_code = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert "&lt;script&gt;" in outside_of_code and not re.search(r"<(?!br>)", outside_of_code)
    for svg in (path / "report_files").glob("*.svg"):
        assert "<script" not in svg.read_text()  # and it is well-formed:
        ElementTree.fromstring(svg.read_text())
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_page_needs_nothing_from_outside(tmp_path):
    html, _, _ = read(fake.study(tmp_path / "s"))
    elements = Elements(html)
    assert "script" not in elements.names and "link" in elements.names
    links = [value for _, attributes in elements.tags for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
    assert links and all(link in ("report.md", "report.json", "data:,") or str(link).startswith("#") for link in links)
    assert not re.findall(r"url\((?!#)|@import", html)
    assert set(re.findall(r"https?://[^\s\"'<)]+", html)) <= {"http://www.w3.org/2000/svg"}
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {link[1:] for link in links if str(link).startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", html))
    assert used <= set(ids)
    assert "prefers-color-scheme:dark" in html


def test_markdown_shows_the_plots(tmp_path):
    path = fake.study(tmp_path / "s")
    _, markdown, _ = read(path)
    images = re.findall(r"\]\((report_files/[^)]+\.svg)\)", markdown)
    assert len(images) == 3 + 3 == len(list((path / "report_files").iterdir()))
    assert all((path / image).read_text().startswith("<svg") for image in images)


def test_same_directory_gives_the_same_bytes(tmp_path):
    path = fake.study(tmp_path / "s", seeds=(0, 1))
    first = read(path)
    svgs = {file.name: file.read_bytes() for file in (path / "report_files").iterdir()}
    assert read(path) == first
    assert {file.name: file.read_bytes() for file in (path / "report_files").iterdir()} == svgs


def test_unfinished_study_says_so(tmp_path):
    path = fake.study(tmp_path / "s")
    fake.write_json(path / "arms" / "hidden" / "seed-0" / "run.json", {"status": "running"})
    _, markdown, figures = read(path)
    assert "1 of 3 runs have not finished" in figures["statement"] and figures["num_runs"]["finished"] == 2
    assert "hidden" not in figures["scores"] and "| hidden" not in markdown.split("## Quality")[1].split("## ")[0]


def test_study_that_has_only_begun(tmp_path):
    path = fake.study(tmp_path / "s")
    shutil.rmtree(path / "arms")
    shutil.rmtree(path / "references")
    (path / "capture.json").unlink()
    html, _, figures = read(path)
    assert "3 of 3 runs have not finished" in Elements(html).text and figures["scores"] == {}


def test_a_single_run(tmp_path):
    html, markdown, figures = read(fake.run(tmp_path / "mine", "logits", seed=4))
    assert figures["kind"] == "run" and figures["seeds"] == [4]
    assert "One run: mine (0.5 ce + logits (forward\\_kl)), seed 4." in markdown
    assert "A single run" in Elements(html).text and "Differences" not in markdown and "Budgets are" not in markdown


def test_layer_map_that_the_data_decided_is_drawn(tmp_path):
    found = {"pairs": [[1, 2], [3, 2]], "student_blocks": [1, 3], "teacher_blocks": [0, 1, 2], "cka": [[0.2, 0.5, 0.9], [0.1, 0.4, 0.8]]}
    html, markdown, _ = read(fake.run(tmp_path / "mine", "hidden", layer_maps={"hidden": found}))
    (label,) = [attrs["aria-label"] for tag, attrs in Elements(html).tags if tag == "figure" and "blocks" in (attrs["aria-label"] or "")]
    assert label == "likeness of blocks in mine; mapped: 1 to 2, 3 to 2"
    assert "Layer maps" in markdown and (tmp_path / "mine" / "report_files" / "layers-0.svg").is_file()
    assert "Layer maps" not in read(fake.run(tmp_path / "other", "hidden"))[0]


def test_not_a_run(tmp_path):
    with pytest.raises(RunError, match=r"found no study\.json or recipe\.json, expected the directory of a study or a run"):
        build_report(tmp_path)
    with pytest.raises(RunError, match="no such directory"):
        build_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("study.json", "{}", "study.json: found no 'name'"),
        ("study.json", "{", "study.json: not readable as JSON"),
        ("arms/sft/seed-0/evals/piqa.json", '{"metrics": {}}', r"piqa\.json: no benchmark result"),
        ("arms/sft/seed-0/run.json", "[", r"run\.json: not readable"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text, message):
    path = fake.study(tmp_path / "s")
    (path / file).write_text(text)
    with pytest.raises(RunError, match=message):
        build_report(path)


def test_report_is_made_without_torch(tmp_path):
    path = fake.study(tmp_path / "s")
    code = (
        "import sys; from limbeck.report.page import build_report; build_report(sys.argv[1]);"
        "sys.exit(', '.join(m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (path / "report.html").is_file()


def evaluated(run: Path, values: list[float], best: int | None = None) -> None:
    """Evaluations of a run after every 8 steps, of which one chose."""
    rows = [
        {"step": 8 * i, "seconds": 1.0, "metrics": {"piqa": {"accuracy": {"value": value, "stderr": 0.03, "higher_is_better": True}}}}
        for i, value in enumerate(values)
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if best is not None:
        chosen = {"benchmark": "piqa", "metric": "accuracy", "step": 8 * best, "value": values[best]}
        fake.write_json(run / "run.json", json.loads((run / "run.json").read_text()) | {"best": chosen})


def test_evaluations_of_a_run_are_drawn_and_what_chose_is_named(tmp_path):
    evaluated(fake.run(tmp_path / "r", "sft"), [0.5, 0.62, 0.58, 0.6], best=1)
    html, markdown, figures = read(tmp_path / "r")
    for text in (Elements(html).text, markdown):
        assert "The student: weights after step 8, chosen by piqa accuracy." in text
        assert "The student was chosen during training by piqa. Scores on what chose are the best of several, and too good" in text
    svg = (tmp_path / "r" / "report_files" / "evaluations-0.svg").read_text()
    assert figures["chosen"] == {"r": [{"benchmark": "piqa", "metric": "accuracy", "step": 8, "value": 0.62}]}
    evaluated(tmp_path / "r", [0.5, 0.62, 0.58, 0.6], best=3)
    read(tmp_path / "r")
    assert svg != (tmp_path / "r" / "report_files" / "evaluations-0.svg").read_text(), "the ring is elsewhere"


def test_evaluations_of_a_study_have_a_line_per_arm(tmp_path):
    path = fake.study(tmp_path / "s", seeds=(0, 1))
    for arm in ("sft", "logits"):
        for seed in (0, 1):
            evaluated(path / "arms" / arm / f"seed-{seed}", [0.5, 0.6, 0.55 + seed / 10, 0.5], best=1 + seed if arm == "logits" else None)
    _, markdown, figures = read(path)
    assert "logits: weights after step 8 and 16, chosen by piqa accuracy." in markdown and list(figures["chosen"]) == ["logits"]
    assert "piqa: accuracy ↑ during training of sft, logits" in markdown and "Students were chosen during training by piqa." in markdown
    evaluated(path / "arms" / "sft" / "seed-0", [0.5, 0.4], best=0)
    assert "sft: weights after step 0, chosen by piqa accuracy. After step 0 nothing is learned yet" in read(path)[1]


def test_without_evaluations_nothing_is_said_of_them(tmp_path):
    html, markdown, figures = read(fake.run(tmp_path / "r", "sft"))
    assert "during training" not in Elements(html).text + markdown and "chosen" not in figures
