"""Rules of the house that a reader would otherwise have to remember: torch-free imports, safe calls, short files, honest docs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import limbeck

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src" / "limbeck").rglob("*.py"))

HEAVY = ("torch", "transformers", "matplotlib")
TORCH_FREE = ("errors", "spec", "cache", "run", "log", "tokens", "objectives", "teachers", "sources", "store", "evaluate", "recipe")
TORCH_FREE += ("study", "report", "cli")
IMPORT_SECONDS = 0.5
MAX_LINES = 350


def test_tests_run_on_this_checkout() -> None:
    """A copied checkout's .venv still points at the original: then the tests would pass on code that is not here."""
    assert Path(limbeck.__file__).is_relative_to(ROOT / "src"), f"installed from {limbeck.__file__}; run: make clean setup"


# --- imports


def heavy_imports(modules: Iterable[str], heavy: Iterable[str] = HEAVY) -> dict[str, list[str]]:
    """The heavy packages that each module is the first to import, in a fresh interpreter."""
    program = """
import importlib, json, sys
modules, heavy = json.loads(sys.argv[1])
found = {}
for module in modules:
    before = set(sys.modules)
    importlib.import_module(module)
    if new := [name for name in heavy if name in sys.modules and name not in before]:
        found[module] = new
print(json.dumps(found))
"""
    arguments = json.dumps([list(modules), list(heavy)])
    done = subprocess.run([sys.executable, "-c", program, arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_command_line_and_recipes_import_without_torch() -> None:
    assert heavy_imports(["limbeck", *(f"limbeck.{name}" for name in TORCH_FREE if find_spec(f"limbeck.{name}"))]) == {}


def test_heavy_imports_are_found() -> None:
    assert heavy_imports(["json", "xml.dom", "xml.sax"], heavy=["xml", "torch"]) == {"xml.dom": ["xml"]}


def test_import_is_fast() -> None:
    program = "import time; start = time.perf_counter(); import limbeck; print(time.perf_counter() - start)"
    seconds = [float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(3)]
    assert min(seconds) < IMPORT_SECONDS, seconds


# --- files


FORBIDDEN_TEXT = {
    "a path of one machine": re.compile(r"/(?:work|root|Users)/\w|/home/(?!user)\w|/opt/(?:pypi|wheels)"),
    "the host of a package registry": re.compile(
        r"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|deb\.debian\.org|anaconda\.org)"
    ),
    "an open end; file an issue instead": re.compile(r"\b(?:TO[D]O|FIX[M]E)\b"),
}
FREE_TEXT = (".jsonl",)
"""Data that people or models wrote may say anything."""


def forbidden_text(files: Iterable[Path]) -> list[str]:
    """`file:line: what` for each line of the text files that has a forbidden pattern."""
    found = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{file}:{number}: {what}"
            for number, line in enumerate(lines, 1)
            for what, pattern in FORBIDDEN_TEXT.items()
            if pattern.search(line)
        ]
    return found


def test_files_name_no_machine_and_leave_no_open_end() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True)
    files = [ROOT / name for name in listed.split("\0") if name and not name.endswith(FREE_TEXT)]
    found = forbidden_text(file for file in files if file.is_file())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "cd /wo" + "rk/main",
        "data: /ro" + "ot/x",
        "/ho" + "me/ann/x",
        "--index-url https://py" + "pi.org/simple",
        "# TO" + "DO: later",
        "x  # FIX" + "ME",
    ],
)
def test_forbidden_text_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "file.py").write_text(f"fine\n{line}\n")
    assert len(forbidden_text(tmp_path.iterdir())) == 1


# --- source


UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "eval", "exec"}
UNSAFE_KEYWORDS = {"trust_remote_code", "shell", "allow_pickle"}


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) for each construct that runs code out of data, or hides errors."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, f"import {alias.name}") for alias in names if alias.name.split(".")[0] in UNSAFE_MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in UNSAFE_MODULES:
                yield node.lineno, f"from {module} import"
            case ast.Call(func=function, keywords=keywords):
                if (called := ast.unparse(function)) in UNSAFE_CALLS:
                    yield node.lineno, f"{called}("
                for keyword in keywords:
                    if keyword.arg in UNSAFE_KEYWORDS and isinstance(keyword.value, ast.Constant) and keyword.value.value:
                        yield node.lineno, f"{keyword.arg}=True"
            case ast.ExceptHandler(type=None):
                yield node.lineno, "bare except"


def test_source_runs_no_code_from_data() -> None:
    found = [f"{file}:{line}: {what}" for file in SOURCES for line, what in unsafe(ast.parse(file.read_text(encoding="utf-8")))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "import pickle"),
        ("def f():\n    from pickle import loads", "from pickle import"),
        ("torch.load(path, weights_only=True)", "torch.load("),
        ("yaml.load(text, Loader=x)", "yaml.load("),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust_remote_code=True"),
        ("subprocess.run(line, shell=True)", "shell=True"),
        ("try:\n    f()\nexcept:\n    pass", "bare except"),
        ("eval(text)", "eval("),
    ],
)
def test_unsafe_source_is_found(source: str, what: str) -> None:
    assert [found for _, found in unsafe(ast.parse(source))] == [what]


def test_safe_source_passes() -> None:
    assert list(unsafe(ast.parse("'torch.load(', model.eval(), yaml.safe_load(x), run(x, shell=False)"))) == []


def too_long(files: Iterable[Path]) -> list[str]:
    """Files that want splitting at a seam one can name."""
    return [
        f"{file}: {count} lines, at most {MAX_LINES}"
        for file in files
        if (count := file.read_text(encoding="utf-8").count("\n")) > MAX_LINES
    ]


def test_files_are_short(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("\n" * (MAX_LINES + 1))
    assert len(too_long([tmp_path / "long.py"])) == 1
    assert not too_long(SOURCES), "\n".join(too_long(SOURCES))


DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "pydantic_core": "pydantic",
    "huggingface_hub": "huggingface-hub",
    "reasoning_gym": "reasoning-gym",
    "lm_eval": "lm-eval",
    "liger_kernel": "liger-kernel",
}
"""Import names that differ from the package that is declared for them."""


def undeclared(tree: ast.AST, requirements: Iterable[str]) -> set[str]:
    """Packages that are imported but not required: they work until whoever brings them along stops doing so."""
    declared = {re.split(r"[^\w-]", requirement)[0].lower().replace("_", "-") for requirement in requirements}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    names = {name.split(".")[0] for name in imported} - sys.stdlib_module_names - {"limbeck", "helpers"}
    return {name for name in names if DISTRIBUTIONS.get(name, name) not in declared}


def test_imports_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    tests = list((ROOT / "tests").rglob("*.py"))
    own = {name for file in tests for name in (file.stem, file.parent.name)}  # helpers of the tests beside them
    trees = {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in (*SOURCES, *tests)}
    found = {name: names for name, tree in trees.items() if (names := undeclared(tree, requirements) - own)}
    assert not found, found


def test_undeclared_imports_are_found() -> None:
    source = "import os, numpy.linalg, yaml\nfrom . import x\nfrom huggingface_hub import y\nfrom tqdm.auto import z"
    assert undeclared(ast.parse(source), ["numpy>=2", "PyYAML", "huggingface_hub>=2"]) == {"tqdm"}


def left_out(package: Path, patterns: Iterable[str]) -> set[Path]:
    """Files beside the code that a wheel would lack: the tests run on an editable install, which has them all."""
    files = {file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    return files - {file for pattern in patterns for file in package.glob(pattern)}


def test_wheel_has_the_files_beside_the_code(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("code.py", "data/a.jsonl", "data/b.txt"):
        (tmp_path / name).touch()
    assert left_out(tmp_path, ["data/**/*.jsonl"]) == {tmp_path / "data" / "b.txt"}
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert left_out(ROOT / "src" / "limbeck", setuptools["package-data"]["limbeck"]) == set()


# --- docs


def missing_commands(text: str, targets: Iterable[str], scripts: Iterable[str]) -> set[str]:
    """Make targets and scripts that a document names and the repository lacks. Prose may say "make sure": only code counts."""
    code = " \n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, re.MULTILINE | re.DOTALL))
    named = {f"make {name}" for name in re.findall(r"\bmake ([a-z][\w-]*)", code)} | set(re.findall(r"\bscripts/\w+", code))
    return named - {f"make {name}" for name in targets} - {f"scripts/{name}" for name in scripts}


def test_docs_name_commands_that_exist() -> None:
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    scripts = [file.name for file in (ROOT / "scripts").iterdir()]
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:
        assert missing_commands(document.read_text(encoding="utf-8"), targets, scripts) == set(), document


def test_missing_commands_are_found() -> None:
    text = "make sure that `make test`, `scripts/check` and `scripts/deploy` run:\n```sh\n$ make demo\nmake coffee ARGS=x\n```\nto make tea"
    assert missing_commands(text, ["test", "demo"], ["check"]) == {"make coffee", "scripts/deploy"}
