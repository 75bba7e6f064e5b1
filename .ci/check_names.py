"""Lint rule: refuse identifiers that do not say what the value is (CONTRIBUTING.md, *Style*).

``python .ci/check_names.py [FILE ...]`` checks the files, or every Python file that git tracks.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

BANNED = {
    *("told", "tell", "tells", "found", "made", "kept", "some", "rest"),
    *("way", "there", "of", "at", "own", "asked", "gone"),
}

#: Names that a file format or an option of the command line fixes.
FIXED = {
    ("fastadapt/cli/graph/explain.py", "at"),  # graph --at
    ("fastadapt/features/store/selection.py", "at"),  # features select --at
    ("fastadapt/features/store/sets.py", "made"),  # key of a set's file
}


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of everything the code names: variables, attributes, arguments, ..."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias):
            yield node.lineno, node.asname or node.name
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name


def tracked_files() -> list[str]:
    """Return the Python files that git tracks, relative to the working directory."""
    listed = subprocess.run(["git", "ls-files", "*.py"], check=True, capture_output=True, text=True)
    return listed.stdout.splitlines()


def main(files: list[str]) -> int:
    """Print each banned name with its place; return 1 if any was printed."""
    failed = 0
    for file in files or tracked_files():
        for line, name in bound_names(ast.parse(Path(file).read_text("utf-8"), file)):
            if name in BANNED and (file, name) not in FIXED:
                print(f"{file}:{line}: {name!r}: choose a name that says what the value is")
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
