"""The command line: a table of all commands, and the call of one.

Results go to standard output, progress and errors to standard error. Exit code 0: finished, or
stopped by a signal with everything saved; 1: a failure; 2: a request that cannot be met.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from fastadapt import __version__
from fastadapt.cli.console import print_error, write_any_text
from fastadapt.errors import RunError, UserError

if TYPE_CHECKING:
    from fastadapt.cli.parser import Command


class Entry(NamedTuple):
    """A command of the table.

    Attributes:
        function: module below `fastadapt.cli`, and name.
        usage: required arguments.
        summary: what the command does.
    """

    function: str
    usage: str
    summary: str


COMMANDS = {
    "train": Entry(
        "train:train", "PRESET_OR_YAML", "train transcoder adapters, or a baseline, on a model pair"
    ),
    "eval": Entry("eval:evaluate", "RUN [RUN ...]", "measure faithfulness: tables, plots, report"),
    "features collect": Entry("features:collect", "RUN", "collect activations and examples"),
    "features merge": Entry("features:merge", "SHARD [SHARD ...]", "merge shards into one store"),
    "features export": Entry("features:export", "RUN", "write pages to browse the features"),
    "features serve": Entry("features:serve", "RUN", "serve these pages on this machine"),
    "features describe": Entry("autointerp:describe", "RUN", "describe features, and score that"),
    "features classify": Entry(
        "autointerp:classify", "RUN", "classify features: language, domain, reasoning"
    ),
    "features overlap": Entry(
        "features:overlap", "RUN", "compare the tokens that fire in target and base"
    ),
    "features select": Entry("features:select", "RUN NAME", "save a named set of features"),
    "features sets": Entry("features:sets", "RUN", "list the sets"),
    "features check": Entry("features:check", "RUN", "verify every file and row of a store"),
    "intervene": Entry("features:intervene", "RUN", "ablate, isolate or add features, as a run"),
    "data prepare": Entry(
        "data:prepare", "[SOURCE]", "select training and validation conversations"
    ),
    "export": Entry("export:export", "RUN", "write a run as one checkpoint, or in another format"),
    "organism build": Entry("organism:build", "", "train both models of the embedded pair again"),
    "organism check": Entry("organism:check", "", "measure the embedded pair"),
    "organism sample": Entry("organism:sample", "", "print problems and answers"),
    "doctor": Entry("doctor:doctor", "", "show what runs on this machine; check the kernels"),
}
#: Commands that print their help if nothing is typed after them.
_HELPFUL = ("eval", "intervene")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Unexpected exceptions keep their traceback."""
    from fastadapt.io.names import unusable_path

    write_any_text()
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except (UserError, RunError) as error:
        from fastadapt.distributed.ranks import tells

        if tells(error):
            print_error(str(error))
        return error.exit_code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        if (reason := unusable_path(error)) is None:
            raise
        print_error(reason)
        return UserError.exit_code


def open_command(name: str) -> Command:
    """Import a command of the table and build its parser."""
    from fastadapt.cli.parser import Command

    module, function = COMMANDS[name].function.split(":")
    loaded = import_module(f"fastadapt.cli.{module}")
    return Command(f"fastadapt {name}", getattr(loaded, function), COMMANDS[name].usage)


def _dispatch(argv: list[str]) -> int:
    first = argv[0] if argv else "--help"
    group = [name for name in COMMANDS if name.startswith(f"{first} ")]
    n_words = 2 if group else 1
    if first == "--version":
        print(f"fastadapt {__version__}")
        return 0
    if first in ("-h", "--help") or (group and argv[1:2] in ([], ["-h"], ["--help"])):
        _print_commands(group or list(COMMANDS), first if group else "")
        return 0
    name, rest = " ".join(argv[:n_words]), argv[n_words:]
    if name not in COMMANDS:
        from fastadapt.cli.parser import nearest

        known = [command.split()[n_words - 1] for command in group or COMMANDS]
        see = f"fastadapt {first} --help" if group else "fastadapt --help"
        hint = nearest(argv[n_words - 1], known)
        raise UserError(f"unknown command {name!r}{hint} (see {see})")

    from fastadapt.distributed.ranks import leave

    return leave(open_command(name).run(rest or ["--help"] * (name in _HELPFUL)))


def _print_commands(names: Sequence[str], group: str) -> None:
    print(f"usage: fastadapt {group or ''} COMMAND ...\n".replace("  ", " "))
    for name in names:
        head = f"{name} {COMMANDS[name].usage}".removeprefix(f"{group} ")
        print(f"  {head:<36} {COMMANDS[name].summary}")
    print(f"\nfastadapt {group} COMMAND --help shows its options.".replace("  ", " "))
    if not group:
        print("fastadapt --version shows the version.")
