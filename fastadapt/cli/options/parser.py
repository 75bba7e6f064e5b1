"""What can be typed after `fastadapt`: the parser of every command, and those of the small ones."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from fastadapt.errors import UserError
from fastadapt.io.documents import DocumentError, RepeatedKeyError, parse_yaml

USAGE = """\
usage: fastadapt COMMAND ...

  train PRESET_OR_YAML   train transcoder adapters, or a baseline, on a model pair
  eval RUN [RUN ...]     how faithful runs are: tables, plots, benchmarks
  features COMMAND RUN   what features mean: collect, browse, describe, classify, select
  intervene RUN          a run with some features removed, kept alone, or put onto the target
  data prepare           training and validation sets out of a data set of conversations
  export RUN             a trained run as one Hugging Face checkpoint, or in another format
  organism               the embedded model pair: build, check, sample
  doctor                 what will be used on this machine and why, and a check of the kernels

fastadapt COMMAND --help tells the options of each; fastadapt --version the version."""

#: Messages of jsonargparse, and how they are said here.
_JSONARGPARSE = [
    (re.compile(pattern), said)
    for pattern, said in (
        (
            r"Does not validate against any of the Union subtypes Subtypes: "
            r"\[<class '(\w+)'>, <class 'NoneType'>\].*Given value: (.*)$",
            r"expected \1 or null, got '\2'",
        ),
        (r"Expected an? <class '(\w+)'>\. Got value: (.*)$", r"expected \1, got '\2'"),
        (r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)$", r"expected one of \1, got '\2'"),
        (r"Expected (.*)\. Got value: (.*)$", r"expected \1, got '\2'"),
        (r'^Parser key "(\S+)":', r"--\1:"),
        (r"^argument (--\S+):", r"\1:"),
        (r"^argument subcommand: invalid choice: ('\S+')", r"unknown command \1"),
        (r"^the following arguments are required: \w+\.(\w+)$", r"--\1 is missing"),
    )
]


_MOST = 600  # characters of a message

#: Values that begin with a dash; argparse itself takes -5e-1 for an option before Python 3.14.
_NEGATIVE = re.compile(r"-(?:\.?\d\S*|\.?inf|infinity|\.?nan)$", re.IGNORECASE)


def _load_yaml(text: str) -> Any:
    """Return a typed value, or the contents of a file of them; text that is no YAML stays text."""
    try:
        parse_yaml(text, f"value {text!r:.40}")  # before jsonargparse's, which recurses in C
    except DocumentError as error:
        if error.__cause__ is None or isinstance(error.__cause__, RepeatedKeyError):
            raise
        raise yaml.YAMLError(str(error)) from None
    return get_loader("yaml")(text)


set_loader("fastadapt", _load_yaml, (yaml.YAMLError,))


class Parser(ArgumentParser):
    """Raises :class:`UserError` where argparse prints and exits; takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ours = {"allow_abbrev": False, "print_config": None, "parser_mode": "fastadapt"}
        super().__init__(*args, **{**ours, **kwargs})
        self._negative_number_matcher = _NEGATIVE

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(f"{self._explain(message)} (see {self.prog} --help)") from ex

    def _explain(self, message: str) -> str:
        left = message.removeprefix("unrecognized arguments: ")
        if left != message:
            name = left.split()[0].split("=")[0]
            if not name.startswith("-"):
                return f"unexpected argument {name!r}"
            return f"unknown option {name}{nearest(name, self._option_string_actions)}"
        flat = " ".join(message.split())
        for pattern, said in _JSONARGPARSE:
            flat = pattern.sub(said, flat)
        return flat if len(flat) <= _MOST else f"{flat[: _MOST - 100]} ... {flat[-100:]}"


def trust_flag(parser: ArgumentParser) -> None:
    """Let ``--trust_remote_code`` be typed: :attr:`PairConfig.trust_remote_code` of this call."""
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        default=False,
        help="run Python code that comes with the models; never read from a run's files",
    )


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean ...?` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def resume_command(argv: Sequence[str], command: Sequence[str] = ("train",)) -> str:
    """What to type to go on, in the shell in which `fastadapt COMMAND ARGV...` was stopped."""
    again = [a for a in argv if a not in ("--resume", "--overwrite")]
    return shlex.join([*_launcher(), _program(), *command, *again, "--resume"])


def _launcher() -> list[str]:
    """What stood before the program where torchrun started this process among others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return []
    here, machines = os.environ["LOCAL_WORLD_SIZE"], os.environ["GROUP_WORLD_SIZE"]
    several = ["--nnodes", machines] if machines != "1" else []
    return ["torchrun", *several, "--nproc-per-node", here, "-m"]


def _program() -> str:
    # A script that the shell found on the PATH is told its path too: what counts is whether
    # `fastadapt` alone leads there. Embedded in another program, there is no path of ours.
    started = sys.argv[0]
    if _launcher():
        return "fastadapt"
    found = shutil.which("fastadapt")
    if Path(started).stem != "fastadapt":
        return "fastadapt"
    if found is not None and os.path.realpath(found) == os.path.realpath(started):
        return "fastadapt"
    return started


def export_parser() -> Parser:
    """The parser of `fastadapt export`."""
    from fastadapt.cli.export import Format

    parser = Parser(
        prog="fastadapt export",
        description="Write a run (or a folder of adapters) as one checkpoint, tensor by tensor; or "
        "read the adapters of a checkpoint published with arXiv 2602.20904 (--format adapters).",
    )
    parser.add_argument("source", metavar="RUN", type=str, help="a run, adapters, or a checkpoint")
    parser.add_argument("--output", type=str, required=True, help="a new folder")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an export that is in the folder"
    )
    parser.add_argument(
        "--format",
        type=Format,
        default="huggingface",
        help="huggingface: for AutoModelForCausalLM, after `import fastadapt.serving`; "
        "hu2026: as published with arXiv 2602.20904; adapters: this library's own",
    )
    for role in ("target", "base"):
        told = f"the {role} model, where it is not the one that the adapters name"
        parser.add_argument(f"--{role}", type=typing.Optional[str], default=None, help=told)  # noqa: UP045
    return parser


def doctor_parser() -> Parser:
    """The parser of `fastadapt doctor`."""
    parser = Parser(
        prog="fastadapt doctor",
        description="Say what will be used on this machine and why, and check the kernels.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
