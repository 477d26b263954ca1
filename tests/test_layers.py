"""The layers of the package, asserted: a module imports from lower layers and its own package only, and there is no import circle.

It reads source and imports nothing of Limbeck; `scripts/check` runs this file as a program.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "limbeck"

# Lowest first. Numbers are those of AGENTS.md; a number with several rows has an order inside. A name is a module, or a package with all
# that is in it; a dotted name (`report.stats`) takes one module out of its package. The empty name is `limbeck/__init__.py`.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("0", ("errors",)),
    ("0", ("spec", "batch", "run", "log", "cache", "jobs", "heap")),
    ("0", ("on_ray", "stopping", "plugins")),
    ("1", ("objectives", "tokens", "report.stats", "report.crossed")),
    ("1", ("store", "report.verdict")),
    ("1", ("report.gap",)),
    ("2", ("models", "adapters", "distributed", "generate", "kernels", "parallel")),
    ("3", ("teachers", "sources", "learner")),
    ("3", ("first_samples",)),
    ("4", ("evaluate", "optim", "checkpoint", "student", "trackers")),
    ("5", ("consistency", "training")),
    ("5", ("recipe", "suites")),
    ("6", ("calibration", "step", "flops", "divide", "not_finite")),
    ("6", ("inputs",)),
    ("6", ("bookkeeping",)),
    ("6", ("milestones",)),
    ("6", ("trainer", "capture")),
    ("6", ("remeasure", "importing", "replay")),
    ("7", ("report",)),
    ("7", ("arms",)),
    ("7", ("study",)),
    ("7", ("protocol",)),
    ("7", ("ledger",)),
    ("7", ("conduct",)),
    ("8", ("doctor", "plan")),
    ("8", ("forecast",)),
    ("8", ("check", "show", "assets", "init", "schema")),
    ("8", ("export",)),
    ("8", ("demo",)),
    ("8", ("cli_options",)),
    ("8", ("cli_store", "cli_assets")),
    ("8", ("cli",)),
    ("top", ("", "__main__")),
)
RANK = {name: rank for rank, (_, names) in enumerate(LAYERS) for name in names}


@dataclass(frozen=True)
class Import:
    """One import of a module of ours. `runs_at_import` is false inside functions; `for_types` is true under `if TYPE_CHECKING`."""

    target: str
    line: int
    runs_at_import: bool = True
    for_types: bool = False


def violations(package: Path) -> list[str]:
    """What breaks the layers in the package at this path, one message each."""
    modules = find_modules(package)
    imports = {name: list(imports_of(name, file, modules)) for name, file in modules.items()}
    problems = [
        f"{modules[name]}: belongs to no layer; add {name.split('.')[0]!r} to LAYERS in {Path(__file__).name} and to AGENTS.md"
        for name in modules
        if unit(name) is None
    ]
    for name, found in imports.items():
        for item in found:
            if unit(name) is not None and unit(item.target) is not None and not may_import(name, item, modules):
                target = f"limbeck.{item.target}".rstrip(".")
                problems.append(
                    f"{modules[name]}:{item.line}: layer {label(name, modules)} imports {target} of layer {label(item.target, modules)}"
                )
    graph = {name: {item.target for item in found if item.runs_at_import and item.target != name} for name, found in imports.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        problems.append("import circle: " + " -> ".join(f"limbeck.{name}".rstrip(".") for name in reversed(error.args[1])))
    return problems


def find_modules(package: Path) -> dict[str, Path]:
    """Files by module name below `limbeck`: `objectives.ce`, `objectives` for its `__init__`, the empty name for the top."""
    modules = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def unit(name: str) -> str | None:
    """The entry of LAYERS that a module belongs to: the longest that is a prefix of its name."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in RANK), None)


def rank(name: str, modules: dict[str, Path]) -> int:
    """Position in LAYERS. The `__init__` of a package that spans layers runs whichever of them is imported: it counts as the lowest."""
    ranks = [RANK[unit(name) or ""]]
    if name and modules.get(name, Path()).name == "__init__.py":
        ranks += [RANK[other] for other in RANK if other.startswith(f"{name}.")]
    return min(ranks)


def label(name: str, modules: dict[str, Path]) -> str:
    return LAYERS[rank(name, modules)][0]


def may_import(name: str, item: Import, modules: dict[str, Path]) -> bool:
    importer, imported = rank(name, modules), rank(item.target, modules)
    is_same_layer_ok = item.for_types or unit(name) == unit(item.target)
    return imported < importer or (imported == importer and is_same_layer_ok)


def imports_of(name: str, file: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """Every import of a module of ours, wherever it stands in the file."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    for node, runs_at_import, for_types in walk(tree):
        for target in targets(node, package, modules):
            yield Import(target, node.lineno, runs_at_import, for_types)


def walk(node: ast.AST, runs_at_import: bool = True, for_types: bool = False) -> Iterator[tuple[ast.stmt | ast.expr, bool, bool]]:
    """Every statement and expression below `node`, with whether it runs when the module is imported and whether it is for types only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).split(".")[-1] == "TYPE_CHECKING":
            for statement in child.body:
                yield statement, False, True
                yield from walk(statement, False, True)
            for statement in child.orelse:
                yield statement, runs_at_import, for_types
                yield from walk(statement, runs_at_import, for_types)
            continue
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.stmt | ast.expr):
            yield child, runs_at_import, for_types
        yield from walk(child, runs_at_import and not is_function, for_types)


def targets(node: ast.AST, package: str, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that an import statement, or a call of `import_module` with a literal, names."""
    match node:
        case ast.Import(names=names):
            yield from (ours(alias.name) for alias in names if is_ours(alias.name))
        case ast.ImportFrom(level=0, module=str(module), names=names) if is_ours(module):
            yield from (submodule(ours(module), alias.name, modules) for alias in names)
        case ast.ImportFrom(level=level, module=module, names=names) if level > 0:
            parents = package.split(".") if package else []
            base = ".".join([*parents[: len(parents) - level + 1], *([module] if module else [])])
            yield from (submodule(base, alias.name, modules) for alias in names)
        case ast.Call(func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
            if is_ours(module):
                yield ours(module)


def submodule(base: str, name: str, modules: dict[str, Path]) -> str:
    """`from base import name`: the module `base.name` where there is one, else `base`."""
    candidate = f"{base}.{name}".strip(".")
    return candidate if candidate in modules else base


def is_ours(module: str) -> bool:
    return module == "limbeck" or module.startswith("limbeck.")


def ours(module: str) -> str:
    return module.removeprefix("limbeck").removeprefix(".")


def test_package_keeps_its_layers() -> None:
    found = violations(PACKAGE)
    assert not found, "\n".join(["a module imports from lower layers and its own package only:", *found])


CASES: dict[str, tuple[dict[str, str], str]] = {
    "lower layer": ({"recipe.py": "from limbeck.spec import Spec", "spec.py": ""}, ""),
    "own package": (
        {
            "objectives/__init__.py": "from limbeck.objectives.ce import x",
            "objectives/ce.py": "from .base import y",
            "objectives/base.py": "",
        },
        "",
    ),
    "higher layer": ({"spec.py": "", "errors.py": "import limbeck.spec"}, "errors.py:1: layer 0 imports limbeck.spec of layer 0"),
    "higher layer, relative": (
        {"teachers/model.py": "from ..recipe import Recipe", "recipe.py": ""},
        "model.py:1: layer 3 imports limbeck.recipe of layer 5",
    ),
    "higher layer, from the top": (
        {"models.py": "from limbeck import errors, cli", "errors.py": "", "cli.py": ""},
        "layer 2 imports limbeck.cli of layer 8",
    ),
    "the top itself": ({"cli.py": "from limbeck import train", "__init__.py": ""}, "layer 8 imports limbeck of layer top"),
    "in a function": (
        {"spec.py": "def f():\n    from limbeck.trainer import train", "trainer.py": ""},
        "spec.py:2: layer 0 imports limbeck.trainer",
    ),
    "by import_module": (
        {"run.py": "import importlib\nimportlib.import_module('limbeck.cli')", "cli.py": ""},
        "run.py:2: layer 0 imports limbeck.cli",
    ),
    "neighbour": ({"objectives/ce.py": "import limbeck.tokens", "tokens/__init__.py": ""}, "layer 1 imports limbeck.tokens of layer 1"),
    "neighbour, for types": ({"objectives/ce.py": "if TYPE_CHECKING:\n    import limbeck.tokens", "tokens/__init__.py": ""}, ""),
    "higher layer, for types": (
        {"run.py": "import typing\nif typing.TYPE_CHECKING:\n    import limbeck.cli", "cli.py": ""},
        "run.py:3: layer 0 imports",
    ),
    "else of types": ({"run.py": "if TYPE_CHECKING:\n    pass\nelse:\n    import limbeck.cli", "cli.py": ""}, "run.py:4: layer 0 imports"),
    "module of its own layer": (
        {"evaluate/base.py": "from limbeck.report import stats", "report/__init__.py": "", "report/stats.py": ""},
        "",
    ),
    "module below its package": (
        {"report/stats.py": "from limbeck.report import page", "report/page.py": ""},
        "layer 1 imports limbeck.report.page of layer 7",
    ),
    "init of a split package": (
        {"report/__init__.py": "import limbeck.report.page", "report/page.py": "", "report/stats.py": ""},
        "__init__.py:1: layer 1 imports",
    ),
    "no layer": ({"helpers.py": ""}, "helpers.py: belongs to no layer; add 'helpers' to LAYERS in test_layers.py"),
    "circle": (
        {"store/a.py": "from limbeck.store import b", "store/b.py": "try:\n    import limbeck.store.a\nfinally:\n    pass"},
        "import circle: limbeck.store.",
    ),
    "circle through a function": ({"store/a.py": "from limbeck.store import b", "store/b.py": "def f():\n    import limbeck.store.a"}, ""),
    "circle through types": (
        {"store/a.py": "from limbeck.store import b", "store/b.py": "if TYPE_CHECKING:\n    import limbeck.store.a"},
        "",
    ),
}


@pytest.mark.parametrize(("files", "expected"), CASES.values(), ids=CASES)
def test_checker_on_a_made_up_package(files: dict[str, str], expected: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = violations(tmp_path)
    assert (len(found) == 1 and expected in found[0]) if expected else not found, found


if __name__ == "__main__":
    sys.exit("\n".join(violations(PACKAGE)) or None)
