"""The import graph follows the order of packages in docs/architecture.md.

Imports inside functions count; those under ``if TYPE_CHECKING`` do not.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/architecture.md"


@cache
def modules() -> dict[str, Path]:
    """Return the file of every module, by its dotted import name."""
    names = {}
    for top, prefix in (("fastadapt", ""), ("kernels", "fastadapt.")):
        for path in (ROOT / top).rglob("*.py"):
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            names[prefix + dotted.removesuffix(".__init__")] = path
    return names


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
        else:
            yield child
            yield from runtime_nodes(child)


def imported_names(name: str, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module or ""
    if node.level:
        package = name.split(".")
        drop = node.level - (modules()[name].name == "__init__.py")
        module = ".".join([*package[: len(package) - drop], *filter(None, [node.module])])
    inner = [f"{module}.{alias.name}" for alias in node.names]
    return [full if full in modules() else module for full in inner]


@cache
def graph() -> dict[str, set[str]]:
    """Return the library's modules that each module imports."""
    edges: dict[str, set[str]] = {}
    for name, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n for node in runtime_nodes(tree) for n in imported_names(name, node)}
        edges[name] = (names & modules().keys()) - {name}
    return edges


def levels() -> dict[str, int]:
    """Return the rank of each package in the page's list, 0 at the top."""
    block = re.search(r"```order\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None, f"no block ```order in {PAGE}"
    lines = [line.split("#")[0].split() for line in block[1].splitlines()]
    return {package: rank for rank, packages in enumerate(lines) for package in packages}


def package_of(name: str) -> str | None:
    """Return the package below fastadapt/; None for fastadapt itself and its entry point."""
    parts = name.split(".")
    return None if len(parts) == 1 or parts[1] == "__main__" else parts[1]


def test_the_graph_is_read() -> None:
    assert "fastadapt.kernels.nmse.autograd" in graph()["fastadapt.kernels.nmse"]
    assert "fastadapt.models.replacement" in graph()["fastadapt.objective"]


def test_every_package_has_a_rank() -> None:
    assert {package_of(name) for name in modules()} - {None} <= levels().keys()


def test_no_import_runs_up_the_order() -> None:
    rank = levels()
    upward = set()
    for name, targets in graph().items():
        for target in targets:
            a, b = package_of(name), package_of(target)
            if a is not None and b is not None and a != b and rank[b] <= rank[a]:
                upward.add((name, target))
    assert sorted(upward) == []


def test_no_modules_import_each_other_in_a_cycle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_folders_are_small() -> None:
    # An __init__.py counts only at the top, where it contains code.
    assert len(list((ROOT / "fastadapt").glob("*.py"))) <= 5
    counts = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert {str(folder): n for folder, n in counts.items() if n > 14} == {}
