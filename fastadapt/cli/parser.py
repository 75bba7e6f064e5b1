"""The parser of every command: options from the signature and docstring of the command's function.

Positional parameters are typed without a name, keyword-only ones as options; a dataclass adds an
option per field, below the parameter's name unless that is ``config``. Help is the docstring's.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import shlex
import shutil
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
import typing_extensions
import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from fastadapt.errors import UserError
from fastadapt.io.documents import DocumentError, RepeatedKeyError, parse_yaml

#: Messages of jsonargparse, and their wording here.
_MESSAGES = [
    (re.compile(pattern), wording)
    for pattern, wording in (
        (
            r"Does not validate against any of the Union subtypes Subtypes: "
            r"\[<class '(\w+)'>, <class 'NoneType'>\].*Given value: (.*)$",
            r"expected \1 or null, got '\2'",
        ),
        (r"Expected an? <class '(\w+)'>\. Got value: (.*)$", r"expected \1, got '\2'"),
        (r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)$", r"expected one of \1, got '\2'"),
        (r"Expected (.*)\. Got value: (.*)$", r"expected \1, got '\2'"),
        (r'^(?:Parser key "|argument --)([^\s":]+)"?(?: element \d+)?:', r"--\1:"),
    )
]
_MISSING = "the following arguments are required: "
_UNKNOWN = "unrecognized arguments: "
_MAX_CHARACTERS = 600  # of a message

#: Values that begin with a dash; argparse itself takes -5e-1 for an option before Python 3.14.
_NEGATIVE = re.compile(r"-(?:\.?\d\S*|\.?inf|infinity|\.?nan)$", re.IGNORECASE)

#: Help of parameters with the same meaning in every command, where its docstring has no other.
_HELP = {
    "device": "device to run on; by default as in training",
    "dtype": "dtype of weights and streams; by default as in training",
    "trust_remote_code": "run Python code that comes with the models; never read from a file",
}
HELP_FLAGS = frozenset({"-h", "--help"})


def _load_yaml(text: str) -> Any:
    """Parse an option's value, or a file of options, as YAML; return other text unchanged."""
    try:
        parse_yaml(text, f"value {text!r:.40}")  # before jsonargparse's, which recurses in C
    except DocumentError as error:
        if error.__cause__ is None or isinstance(error.__cause__, RepeatedKeyError):
            raise
        raise yaml.YAMLError(str(error)) from None
    return get_loader("yaml")(text)


set_loader("fastadapt", _load_yaml, (yaml.YAMLError,))


class Parser(ArgumentParser):
    """Parser that raises :class:`UserError` where argparse exits; takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults = {"allow_abbrev": False, "print_config": None, "parser_mode": "fastadapt"}
        super().__init__(*args, **{**defaults, **kwargs})
        self._negative_number_matcher = _NEGATIVE

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(f"{self._explain(message)} (see {self.prog} --help)") from ex

    def option_names(self) -> list[str]:
        """Return the names of all options of the command, with their dashes."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def _explain(self, message: str) -> str:
        if message.startswith(_UNKNOWN):
            name = message.removeprefix(_UNKNOWN).split()[0].split("=")[0]
            if not name.startswith("-"):
                return f"unexpected argument {name!r}"
            return f"unknown option {name}{nearest(name, self.option_names())}"
        if message.startswith(_MISSING):
            spelled = {a.dest: [*a.option_strings, a.metavar][0] for a in self._actions}
            names = [str(spelled[dest]) for dest in message.removeprefix(_MISSING).split(", ")]
            return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
        flat = " ".join(message.split())
        for pattern, wording in _MESSAGES:
            flat = pattern.sub(wording, flat)
        cut = _MAX_CHARACTERS
        return flat if len(flat) <= cut else f"{flat[: cut - 100]} ... {flat[-100:]}"


# --- commands -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Typed:
    """Metadata of an annotated parameter: how it is written on the command line.

    Attributes:
        option: spelling of the option, if it is not the parameter's name.
        flags: for a dataclass: booleans are flags without a value, tuples several words.
        skip: for a dataclass of components: the fields of each component without an option.
    """

    option: str | None = None
    flags: bool = False
    skip: Mapping[str, set[str]] = dataclasses.field(default_factory=dict, hash=False)


class Command:
    """Command whose options come from the signature and docstring of a function.

    A parameter ``argv`` gets the arguments unparsed; a function with no other parses them itself.

    Args:
        prog: words of the command, such as "fastadapt features collect".
        function: returns the exit code.
    """

    def __init__(self, prog: str, function: Callable[..., int]) -> None:
        self.function = function
        self._parameters = _parameters(function)
        about = docstring_parser.parse(inspect.getdoc(function) or "")
        self.parser = Parser(
            prog=prog,
            description=" ".join(filter(None, (about.short_description, about.long_description))),
        )
        usage = [prog]
        for name, parameter in self._parameters.items():
            if dataclasses.is_dataclass(parameter.hint):
                self._add_config(name, parameter.hint, parameter.typed)
            elif name != "argv":
                usage += _add_argument(self.parser, parameter)
        self.parser.usage = " ".join([*usage, "[--OPTION VALUE ...]"])

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Parse the words of the command line into the arguments of the command's function.

        Raises:
            UserError: an unknown option, a missing argument or an impossible value.
        """
        from fastadapt.training.config import from_dict

        values = self.parser.parse_args([self._spell(word) for word in argv]).as_dict()
        arguments: dict[str, Any] = {"argv": list(argv)}
        for name, (_, hint, *_) in self._parameters.items():
            if not dataclasses.is_dataclass(hint):
                arguments.setdefault(name, values.get(name))
            elif name == "config":
                names = {field.name for field in dataclasses.fields(hint)}
                flat = {key: value for key, value in values.items() if key in names}
                arguments[name] = from_dict(flat, typing.cast(type, hint))
            else:
                arguments[name] = from_dict(values[name], typing.cast(type, hint), f"{name}.")
        return {name: arguments[name] for name in self._parameters}

    def run(self, argv: Sequence[str]) -> int:
        """Parse the arguments and call the function; print its help if that was requested."""
        if set(self._parameters) == {"argv"}:
            return self.function(argv)
        if HELP_FLAGS & set(argv):
            self.parser.print_help()
            return 0
        from fastadapt.cli.console import quiet_transformers

        arguments = self.parse(argv)
        quiet_transformers()
        return self.function(**arguments)

    def _add_config(self, name: str, kind: Any, typed: Typed) -> None:
        if typed.flags:
            for field in _parameters(kind).values():
                _add_argument(self.parser, field)
        elif all(map(dataclasses.is_dataclass, typing.get_type_hints(kind).values())):
            add_components(self.parser, kind, typed.skip)
        else:
            skip = {field.name for field in dataclasses.fields(kind)} & set(self._parameters)
            prefix = None if name == "config" else name
            self.parser.add_class_arguments(kind, prefix, skip=skip)

    def _spell(self, word: str) -> str:
        """Return an option's word with the known spelling: --max_tokens for --max-tokens."""
        name, equals, value = word.partition("=")
        spelled = "--" + name[2:].replace("-", "_")
        known = self.parser.option_names()
        take = name.startswith("--") and name not in known and spelled in known
        return spelled + equals + value if take else word


def add_components(parser: Parser, kind: type, skip: Mapping[str, set[str]] | None = None) -> None:
    """Add options ``--component.field`` for a dataclass whose fields are dataclasses."""
    for name, component in typing.get_type_hints(kind).items():
        parser.add_class_arguments(component, name, skip=(skip or {}).get(name, set()))


class _Parameter(typing.NamedTuple):
    name: str
    hint: Any
    typed: Typed
    default: Any
    help: str
    is_positional: bool


def _parameters(function: Callable[..., Any]) -> dict[str, _Parameter]:
    """Return the parameters of a function or dataclass by name."""
    about = docstring_parser.parse(inspect.getdoc(function) or "")
    texts = {n: p.description or "" for p in about.params for n in p.arg_name.split(", ")}
    annotated = function.__init__ if inspect.isclass(function) else function
    # typing's own, in Python 3.10, puts Optional around what has the default None.
    hints: dict[str, Any] = typing_extensions.get_type_hints(annotated, include_extras=True)
    parameters = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint, typed = hints[name], Typed()
        if typing.get_origin(hint) is typing.Annotated:
            hint, typed = typing.get_args(hint)
        text = texts.get(name, _HELP.get(name, ""))
        is_positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and not inspect.isclass(
            function
        )
        parameters[name] = _Parameter(name, hint, typed, parameter.default, text, is_positional)
    return parameters


def _add_argument(parser: Parser, parameter: _Parameter) -> list[str]:
    """Add a parameter's argument to the parser, and return its words in the usage line."""
    is_required = parameter.default is inspect.Parameter.empty
    upper = parameter.name.upper()
    options: dict[str, Any] = {"type": parameter.hint, "help": parameter.help}
    if parameter.hint is bool:
        options = {"action": "store_true", "default": False, "help": parameter.help}
    elif not is_required:
        options["default"] = parameter.default
    if typing.get_origin(parameter.hint) is tuple:
        default = [] if is_required else list(parameter.default or ())
        kind = float if typing.get_args(parameter.hint)[0] is float else str
        options |= {"type": kind, "nargs": "+", "default": default}
    if not parameter.is_positional:
        option = parameter.typed.option or f"--{parameter.name}"
        parser.add_argument(option, required=is_required, **options)
        return [option, upper] if is_required else []
    usage = upper = upper.removesuffix("S")
    if typing.get_origin(parameter.hint) is list:
        options |= {"type": str, "nargs": "+" if is_required else "*"}
        usage = f"{upper} [{upper} ...]" if is_required else f"[{upper} ...]"
    elif not is_required:
        options["nargs"] = "?"
        usage = f"[{upper}]"
    parser.add_argument(parameter.name, metavar=upper, **options)
    return [usage]


# --- texts ----------------------------------------------------------------------------------------


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


#: Seconds that torchrun waits, after a signal, for a step and a checkpoint; its default is 30.
SHUTDOWN_TIMEOUT = 600


def resume_command(argv: Sequence[str], command: Sequence[str] = ("train",)) -> str:
    """Return the command line that resumes `fastadapt COMMAND ARGV...` in the same shell."""
    again = [a for a in argv if a not in ("--resume", "--overwrite")]
    return shlex.join([*_launcher(), _program(), *command, *again, "--resume"])


def _launcher() -> list[str]:
    """Return the torchrun command that started this process and others; empty without others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return []
    local, machines = os.environ["LOCAL_WORLD_SIZE"], os.environ["GROUP_WORLD_SIZE"]
    options = ["--nnodes", machines] if machines != "1" else []
    options += ["--nproc-per-node", local]
    from torch.distributed.launcher.api import LaunchConfig

    if hasattr(LaunchConfig, "shutdown_timeout"):  # from torch 2.12 on
        options += ["--shutdown-timeout", str(SHUTDOWN_TIMEOUT)]
    return ["torchrun", *options, "-m"]


def _program() -> str:
    # sys.argv[0] is a path even if the shell looked `fastadapt` up: it is needed only where the
    # bare name leads to another program. Embedded in another program, there is no path of ours.
    started, on_path = sys.argv[0], shutil.which("fastadapt")
    if _launcher() or Path(started).stem != "fastadapt":
        return "fastadapt"
    if on_path is not None and os.path.realpath(on_path) == os.path.realpath(started):
        return "fastadapt"
    return started
