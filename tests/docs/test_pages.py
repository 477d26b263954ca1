"""The documentation hangs together: every page is in the table of contents, every link leads somewhere, every key is there."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from limbeck.recipe import Recipe
from limbeck.spec import Family
from limbeck.training import Train

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINKED = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md"))]


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as MyST and code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(file: Path) -> list[str]:
    """Relative links that lead to no file, or to no heading in it."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        page = file.parent / path if path else file
        if not page.exists() or (anchor and anchor not in slugs(page.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", LINKED, ids=[str(page.relative_to(ROOT)) for page in LINKED])
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One thing, and `x`\n```\n# no heading\n```\n[up](#one-thing-and-x) [web](https://a.b/c)\n")
    (tmp_path / "b.md").write_text("[a](a.md) [a](a.md#one-thing-and-x) [b](a.md#no-heading) [c](c.md) [d](#nothing)\n")
    assert broken_links(tmp_path / "a.md") == []
    assert broken_links(tmp_path / "b.md") == ["a.md#no-heading", "c.md", "#nothing"]


def test_contents_list_every_page_once() -> None:
    listed = re.search(r"```\{toctree\}\n(?::[^\n]*\n)*\n?(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    assert listed
    names = listed[1].split()
    assert sorted(names) == [page.stem for page in PAGES if page.stem != "index"] and len(set(names)) == len(names)


def test_troubles_are_real() -> None:
    """A heading in code is a message of ours: its text stands in the source."""
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    headings = re.findall(r"^## `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) > 3
    for heading in headings:
        parts = [part for part in re.split(r"\.\.\.|turn \d+ ", heading) if part.strip()]
        assert all(part.strip() in source for part in parts), heading


@pytest.fixture(scope="module")
def fields() -> ModuleType:
    spec = spec_from_file_location("fields", DOCS / "fields.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_is_in_the_tables(fields: ModuleType) -> None:
    text = fields.markdown()
    sections = [Recipe, Train, *(member for family in Family.__subclasses__() for member in family.members.values())]
    for section in sections:
        if section.__module__.startswith("limbeck."):
            assert section.__doc__ and section.__doc__.split("\n")[0] in text
        for key, field in section.model_fields.items():
            if section.__module__.startswith("limbeck.") and key != "type":
                doc = " ".join((field.description or "").replace("|", "\\|").split())
                assert f"| `{key}` | " in text and doc in text, (section, key)


def test_tables_are_filled_in_where_they_are_asked_for(fields: ModuleType) -> None:
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert page.count(fields.MARK) == 1
    assert "| `learning_rate` | number > 0 | `0.0001` |" in fields.fill(page)
    assert fields.fill("nothing to fill in") == "nothing to fill in"


def test_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    """What `make docs` does; where the generator is installed."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--nitpicky", "--quiet", "-b", "html"]
    done = subprocess.run([*command, str(DOCS), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "recipes.html").read_text(encoding="utf-8")
    assert "Peak learning rate" in page and "&lt;!-- fields" not in page
