"""Code that pages and notebooks print: its command lines, and its names that nothing defines."""

from __future__ import annotations

import ast
import builtins
from importlib import import_module
from typing import Any


def lines(*code: str) -> list[str]:
    """Return the command lines of blocks; a backslash joins two lines of text."""
    return "".join(code).replace("\\\n", " ").splitlines()


def unresolved(code: str) -> list[str]:
    """Return the names that code uses and neither defines nor imports from what exists."""
    nodes = list(ast.walk(ast.parse(code)))
    modules: dict[str, Any] = {}
    known, missing = set(dir(builtins)), []
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name.partition(".")[0]] = import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = import_module(node.module or "")
            missing += [a.name for a in node.names if not hasattr(module, a.name)]
            known |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
    for node in nodes:
        if isinstance(node, ast.Name) and node.id not in known | modules.keys():
            missing.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            imported = modules.get(node.value.id)
            if imported is not None and not hasattr(imported, node.attr):
                missing.append(f"{node.value.id}.{node.attr}")
    return missing
