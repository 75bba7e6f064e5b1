"""Public names, signatures and options are those of ``public_api.txt`` (docs/stability.md).

``python tests/packaging/test_public_api.py`` prints what differs; with ``--write`` it writes the
list anew.
"""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ForwardRef

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("public_api.txt")
#: Commands whose options tests/cli/test_cli.py lists.
LISTED_ELSEWHERE = {"contrast", "data inspect", "data prepare", "eval", "train", "where"}
#: Public modules beside ``fastadapt`` and the modules of ``fastadapt.kernels``.
OTHERS = (
    "fastadapt.adapter.coder_files",
    "fastadapt.interop.cross_layer",
    "fastadapt.interop.dictionary_learning",
    "fastadapt.interop.hu2026",
    "fastadapt.interop.saelens",
    "fastadapt.interop.sparsify",
    "fastadapt.interop.transcoder_sets",
    "fastadapt.serving",
)

#: What public functions and attributes give, and the pages use: classes, and methods of classes of
#: which nothing else is public.
RESULTS = (
    "fastadapt.adapter.coder.Aux",
    "fastadapt.effects.generate.Generated",
    "fastadapt.effects.trace.Firing",
    "fastadapt.effects.trace.Trace",
    "fastadapt.effects.views.FeatureCard",
    "fastadapt.effects.views.Responses",
    "fastadapt.effects.views.TextFeatures",
    "fastadapt.effects.views.TextKL",
    "fastadapt.features.store.store.Store.read",
    "fastadapt.hub.push.Pushed",
)
#: Public members whose names begin with an underscore.
OPERATORS = ("__getitem__",)


class Text(str):
    """Annotation whose representation is its text."""

    __repr__ = str.__str__


def annotation(value: Any) -> Any:
    if isinstance(value, ForwardRef):
        value = value.__forward_arg__
    return value if value is inspect.Parameter.empty or not isinstance(value, str) else Text(value)


def signature(function: Any) -> str:
    """Return the parameters with annotations as written, and the defaults."""
    try:
        full = inspect.signature(function)
    except ValueError:  # an exception without a constructor of its own
        return "(...)"
    parameters = [p.replace(annotation=annotation(p.annotation)) for p in full.parameters.values()]
    returned = annotation(full.return_annotation)
    return str(full.replace(parameters=parameters, return_annotation=returned))


def members(kind: type) -> dict[str, Any]:
    """Return the public attributes that this library's classes define, without those of torch."""
    inside = [base for base in reversed(kind.__mro__) if base.__module__.startswith("fastadapt")]
    merged = {name: value for base in inside for name, value in vars(base).items()}
    fields = (*getattr(kind, "_fields", ()), *getattr(kind, "__dataclass_fields__", ()))
    public = {n: v for n, v in merged.items() if n in OPERATORS or not n.startswith("_")}
    return {n: v for n, v in public.items() if n not in fields}


def describe(name: str, value: Any) -> Iterator[str]:
    """Yield the line of a public name and, for a class, one for each public member."""
    if inspect.isclass(value):
        yield f"class {name}{signature(value)}"
        for member, each in sorted(members(value).items()):
            if isinstance(each, property | cached_property):
                yield f"  {member}: property"
            elif isinstance(each, classmethod | staticmethod):
                yield f"  {type(each).__name__} {member}{signature(each.__func__)}"
            elif callable(each):
                yield f"  {member}{signature(each)}"
            else:
                yield f"  {member}: {type(each).__name__}"
    elif callable(value):
        yield f"{name}{signature(value)}"
    elif isinstance(value, tuple | int | float):
        yield f"{name} = {value!r}"
    else:
        yield f"{name}: {type(value).__name__}"


def public_modules() -> list[str]:
    """Return ``fastadapt``, other packages' public modules, and those of ``fastadapt.kernels``."""
    import fastadapt.kernels

    modules = {each.name for each in pkgutil.iter_modules(fastadapt.kernels.__path__)}
    modules |= {path.parent.name for path in ROOT.glob("kernels/*/__init__.py")}  # mapped folders
    names = [f"fastadapt.kernels.{name}" for name in sorted(modules)]
    return [
        "fastadapt",
        *OTHERS,
        *(name for name in names if hasattr(import_module(name), "__all__")),
    ]


def command_lines() -> Iterator[str]:
    """Yield each command with its positional arguments and options."""
    from fastadapt.cli.main import COMMANDS, open_command

    for name in sorted(COMMANDS.keys() - LISTED_ELSEWHERE):
        parser = open_command(name).parser
        words = str(parser.usage).removesuffix(" [--OPTION VALUE ...]")
        options = set(parser.option_names()) - {"--help", *words.split()}
        yield " ".join([words, *sorted(options)])


def public_api() -> str:
    """Return the list of everything that is public."""
    lines = []
    for name in public_modules():
        module = import_module(name)
        lines.append(f"# {name}")
        for public in sorted(module.__all__):
            lines += describe(public, getattr(module, public))
        lines.append("")
    lines.append("# results")
    for path in RESULTS:
        name = re.sub(r".*\.(?=[A-Z])", "", path)  # their modules are not public
        lines += describe(name, pkgutil.resolve_name(path))
    lines.append("")
    return "\n".join([*lines, "# command line", *command_lines()]) + "\n"


def differences(old: str, new: str) -> list[str]:
    """Return the lines that were removed (``-``) and added (``+``)."""
    lines = difflib.ndiff(old.splitlines(), new.splitlines())
    return [line for line in lines if line.startswith(("- ", "+ "))]


def test_public_names_signatures_and_options_are_frozen() -> None:
    changed = differences(LIST.read_text(encoding="utf-8"), public_api())
    assert not changed, (
        "the public API differs from public_api.txt; if that is meant, name it in CHANGELOG.md and "
        "run: python tests/packaging/test_public_api.py --write\n" + "\n".join(changed)
    )


def test_the_list_depends_on_no_address() -> None:
    assert not re.search(r" at 0x[0-9a-f]+", LIST.read_text(encoding="utf-8"))


def test_what_public_functions_return_is_listed() -> None:
    """Classes of this library that a run's methods, and calls of adapters, name as their result."""
    import fastadapt

    listed = {path.rpartition(".")[2] for path in RESULTS} | set(fastadapt.__all__)
    calls = [fastadapt.TranscoderAdapter.forward, *members(fastadapt.LoadedRun).values()]
    texts = [str(inspect.signature(call).return_annotation) for call in calls if callable(call)]
    returned = set(re.findall(r"\b[A-Z]\w+", " ".join(texts))) - {"Tensor"}
    assert returned == {"Aux", "FeatureCard", "Pushed", "Responses", "TextFeatures", "TextKL"}
    assert returned <= listed


def test_every_public_module_has_a_page() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.rst")]
    documented = re.findall(r"^\.\. automodule:: (\S+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(documented) == sorted(public_modules())


class Before:
    """Class with a method, for the tests of the comparison."""

    __module__ = "fastadapt.example"

    def measure(self, x: int, *, k: float | None = None) -> int:
        return x


class Default(Before):
    __module__ = "fastadapt.example"

    def measure(self, x: int, *, k: float | None = 8.0) -> int:
        return x


class Renamed(Before):
    __module__ = "fastadapt.example"

    def measure(self, y: int, *, k: float | None = None) -> int:
        return y


@pytest.mark.parametrize("changed", [Default, Renamed])
def test_a_changed_signature_is_reported(changed: type) -> None:
    old, new = ("\n".join(describe("Example", kind)) for kind in (Before, changed))
    assert differences(old, old) == []
    removed, added = differences(old, new)
    assert removed == "-   measure(self, x: int, *, k: float | None = None) -> int"
    assert added.startswith("+   measure(self, ")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        LIST.write_text(public_api(), encoding="utf-8")
    elif sys.argv[1:]:
        sys.exit(f"expected --write or nothing, got {' '.join(sys.argv[1:])}")
    else:
        print("\n".join(differences(LIST.read_text(encoding="utf-8"), public_api())))
