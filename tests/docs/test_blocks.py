"""Every fenced block of README and docs is parsed, and run where that is cheap: on tiny models that bear the names which the docs use.

A block of a kind that is not known here is wrong: nothing goes unchecked.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from limbeck import cli
from limbeck.cli import app, in_order
from limbeck.evaluate import Benchmark
from limbeck.objectives import Term
from limbeck.objectives.divergences import Divergence
from limbeck.recipe import Recipe
from limbeck.sources import Source
from limbeck.spec import merge, validate
from limbeck.study import Study
from limbeck.teachers import Teacher

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PROGRAMS = (
    "make",
    "python",
    "pip",
    "cd",
    "scripts/check",
    "scripts/test",
    "scripts/lowest_versions",
    "scripts/serve_teacher",
    "ruff",
)
"""What else may stand in a shell block. Make's targets and the scripts are checked in test_house.py."""

SOURCE = {"type": "dataset", "data": "data.jsonl"}
MODEL = {"type": "model", "model": "owner/model"}
PART = {"source": SOURCE, "teacher": MODEL, "student": {"model": "owner/model"}, "train": {"steps": 1}, "objective": [{"type": "ce"}]}
"""Where a block shows a part of a recipe, the rest of it."""


@dataclass(frozen=True)
class Block:
    """A fenced block: the file and line where it starts, the word behind the fence, and its text."""

    where: str
    kind: str
    text: str


def blocks(file: Path) -> list[Block]:
    """The fenced blocks of a Markdown file, in order."""
    found: list[Block] = []
    opened: tuple[str, str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"(`{3,})(.*)", line)
        if opened is None and fence:
            opened, lines = (fence[1], fence[2].strip(), number), []
        elif opened and line.strip() == opened[0]:
            found.append(Block(f"{file.name}:{opened[2]}", opened[1], "\n".join(lines) + "\n"))
            opened = None
        else:
            lines.append(line)
    assert opened is None, f"{file.name}:{opened[2]}: the fence is never closed"
    return found


def check_block(block: Block) -> None:
    """Raise where a block is wrong, as far as can be told without running it."""
    match block.kind:
        case "yaml":
            check_yaml(block.text, block.where)
        case "sh":
            for command in commands(block.text):
                check_command(command)
        case "json":
            for line in block.text.splitlines():
                json.loads(line)
        case "python":
            compile(block.text, block.where, "exec")
        case "text" | "{toctree}":
            pass
        case _:
            raise AssertionError(f"{block.where}: found a block of kind {block.kind!r}, expected yaml, sh, json, python or text")


def check_yaml(text: str, where: str) -> None:
    """A study, a recipe, or a part of a recipe."""
    tree = yaml.safe_load(text)
    if "arms" not in tree:
        validate(Recipe, {**PART, **tree}, where)
        return
    base = PART if isinstance(tree.get("base"), str) else merge(PART, tree.get("base", {}))
    validate(Study, {**tree, "base": base}, where).recipes(where)


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of a shell block as words, without comments and prompts."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words[: words.index(">")] if ">" in words else words


def limbeck_arguments(command: list[str]) -> list[str] | None:
    """What the command line of Limbeck is given, also under torchrun; None for another program."""
    if command[0] == "limbeck":
        return command[1:]
    if command[0] in ("torchrun", "python") and "-m" in command:
        module = command.index("-m") + 1
        return command[module + 1 :] if command[module : module + 1] == ["limbeck"] else None
    return None


def check_command(command: list[str]) -> None:
    """A command of Limbeck must parse; others must be known."""
    arguments = limbeck_arguments(command)
    if arguments is not None:
        parse(in_order(arguments))
    elif command[0] not in OTHER_PROGRAMS:
        raise AssertionError(f"found the program {command[0]!r}, expected limbeck or one of: {', '.join(OTHER_PROGRAMS)}")


def parse(arguments: list[str]) -> str:
    """The verb that these arguments name, with every option and argument parsed; nothing runs."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("limbeck", list(arguments))
    name = ""
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return name


ALL = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("block", ALL, ids=[block.where for block in ALL])
def test_block_is_right(block: Block) -> None:
    check_block(block)


def test_pages_have_blocks_of_every_kind() -> None:
    """Or the tests above would pass on nothing."""
    assert {block.kind for block in ALL} >= {"yaml", "sh", "json", "python"} and len(ALL) > 25


@pytest.mark.parametrize(
    ("kind", "text", "what"),
    [
        ("yaml", "source: {type: dataset, data: x}\ntrian: {steps: 1}", "unknown key"),
        ("yaml", "objective: [{type: logit}]", "did you mean 'logits'"),
        ("yaml", "name: s\nbase: recipe.yaml\narms: {a: {train: {stepz: 2}}}", "arm 'a'.*unknown key"),
        ("yaml", "teacher: {type: none}\nobjective: [{type: logits}]", "needs a teacher"),
        ("sh", "limbeck trian recipe.yaml", "No such command"),
        ("sh", "limbeck train recipe.yaml --output runs/x   # where", "No such option"),
        ("sh", "torchrun --nproc-per-node 2 -m limbeck train", "Missing parameter: recipe"),
        ("sh", "limbeck assets get demo", "No such command"),
        ("sh", "limbeck schema recipes", "recipes"),
        ("sh", "distil recipe.yaml", "found the program 'distil'"),
        ("json", '{"messages": [}', "Expecting value"),
        ("python", "import limbeck\nlimbeck.train(", "never closed"),
        ("yml", "a: 1", "of kind 'yml'"),
        ("", "limbeck", "of kind ''"),
    ],
)
def test_wrong_blocks_are_found(kind: str, text: str, what: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n```{kind}\n{text}\n```\nafter\n")
    (block,) = blocks(page)
    assert (block.where, block.kind) == ("page.md:2", kind)
    with pytest.raises(Exception, match=what):
        check_block(block)


# --- running


@pytest.fixture
def workplace(demo_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, with the demo's names on tiny models; what a page registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    families = [family.members for family in (Term, Divergence, Teacher, Source, Benchmark)]
    before = [dict(members) for members in families]
    yield tmp_path
    for members, known in zip(families, before, strict=True):
        members.clear()  # type: ignore[attr-defined]
        members.update(known)  # type: ignore[arg-type]


def shorten(folder: Path) -> None:
    """Two steps do for a test."""
    for file in folder.glob("*.yaml"):
        text = re.sub(r"\b(steps|limit): \d+", r"\1: 2", file.read_text(encoding="utf-8"))
        file.write_text(text, encoding="utf-8")


def run_limbeck(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["limbeck", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code, f"limbeck {shlex.join(arguments)}: exit code {stop.value.code}"


EXPENSIVE = ("demo", "assets")
"""Verbs that need the network or minutes. Several processes are the distributed tests' business."""


def walk(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Do what a page says, from top to bottom: keep the files that it shows, give its commands, run its Python. Returns the verbs."""
    verbs: list[str] = []
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.kind == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", block.text)):
            (folder / name[1]).write_text(block.text, encoding="utf-8")
        for command in commands(block.text) if block.kind == "sh" else ():
            arguments = limbeck_arguments(command)
            if command[0] == "limbeck" and arguments and arguments[0] not in EXPENSIVE:
                shorten(folder)
                run_limbeck(arguments, monkeypatch)
                verbs.append(arguments[0])
        if block.kind == "python":
            shorten(folder)
            names = run_python(block, names, folder)
    return verbs


def run_python(block: Block, names: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a block with what the blocks before it defined, as a file: specs read their own source. Its lines are those of the page."""
    file = folder / f"{block.where.replace(':', '_')}.py"
    file.write_text("\n" * int(block.where.rpartition(":")[2]) + block.text, encoding="utf-8")
    known = {key: value for key, value in names.items() if not key.startswith("__")}
    return known | runpy.run_path(str(file), init_globals=known)


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("README.md", {"check", "plan", "train", "capture", "init", "study", "report", "eval", "export"}),
        ("docs/start.md", {"init", "check", "train", "study"}),
        ("docs/writing-a-loss.md", set()),
        ("docs/writing-a-teacher.md", set()),
        ("docs/writing-a-benchmark.md", set()),
    ],
)
def test_page_does_what_it_says(page: str, expected: set[str], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(walk(ROOT / page, workplace, monkeypatch)) == expected


@pytest.mark.parametrize(
    "text",
    ["```sh\nlimbeck check nowhere.yaml\n```\n", "```python\nx = 1\n```\n```python\nassert x == 2\n```\n"],
)
def test_page_that_does_not_work_is_found(text: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "page.md").write_text(text)
    with pytest.raises(AssertionError):
        walk(workplace / "page.md", workplace, monkeypatch)


def test_shown_teacher_serves_a_run(workplace: Path, make_model_dir: Callable[..., Path], write_jsonl: Callable[..., Path]) -> None:
    """The page's teacher, term and benchmark hold together with the trainer, not only with themselves."""
    import limbeck

    for page in ("writing-a-teacher", "writing-a-loss", "writing-a-benchmark"):
        names: dict[str, Any] = {}
        for block in blocks(ROOT / "docs" / f"{page}.md"):
            names = run_python(block, names, workplace) if block.kind == "python" and "evaluate_model" not in block.text else names
    recipe = {
        "student": {"model": str(make_model_dir(layers=2))},
        "teacher": {"type": "uniform"},
        "source": {"type": "dataset", "data": str(write_jsonl([{"prompt": "The weather", "completion": " in Paris is sunny."}]))},
        "objective": [{"type": "logits", "divergence": "total_variation"}, {"type": "top_tokens", "num_tokens": 4}],
        "train": {"steps": 2, "batch_size": 1},
        "evaluate": [{"type": "brevity", "max_new_tokens": 2}],
    }
    run = limbeck.train(recipe, workplace / "run")
    assert run.metrics()[-1]["loss"] > 0 and run.evals()["brevity"]["metrics"]["tokens"]["value"] <= 2
