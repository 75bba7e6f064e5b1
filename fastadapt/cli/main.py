"""Table of the commands, and the entry point that runs one of them.

Results go to standard output, progress and errors to standard error. Exit codes: 0, finished, or
stopped by a signal after saving; 1, a failure; 2, an invalid request.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from fastadapt import __version__
from fastadapt.cli.console import print_error, show_warnings, write_any_text
from fastadapt.errors import RunError, UserError

if TYPE_CHECKING:
    from fastadapt.cli.parser import Command


#: Commands by name: module below `fastadapt.cli` and function, and a description.
COMMANDS = {
    "train": ("train:train", "train transcoder adapters, or a baseline, on a model pair"),
    "eval": ("eval:evaluate", "measure how faithful runs are: tables, plots, benchmarks, report"),
    "where": (
        "where:where",
        "measure in which parts of the models a pair differs, before training",
    ),
    "features collect": ("features:collect", "collect where each feature of a run fires"),
    "features merge": ("features:merge", "merge shards into one store"),
    "features export": ("features:export", "write pages to browse the features"),
    "features serve": ("features:serve", "serve these pages to this machine"),
    "features describe": ("autointerp:describe", "describe features, and score descriptions"),
    "features classify": ("autointerp:classify", "classify features: language, domain, reasoning"),
    "features overlap": ("features:overlap", "compare the tokens that fire in target and base"),
    "features compare": ("features:compare", "compare two runs' features by their numbers"),
    "features show": ("effects:show", "show features, or list the strongest"),
    "features effects": ("effects:effects", "ablate the strongest features, one by one"),
    "features select": ("features:select", "save a named set of features"),
    "features sets": ("features:sets", "list the sets"),
    "features check": ("features:check", "verify every file and row of a store"),
    "intervene": ("effects:intervene", "ablate features, isolate them or add them to the target"),
    "contrast": ("contrast:contrast", "compare P(word) at labelled places and at matched ones"),
    "study": ("eval:study", "measure what a run's features of hesitation do, beside controls"),
    "changes": ("effects:changes", "write the page 'what changed' of a run"),
    "trace": ("effects:trace", "show which features fire on a prompt, and each model's KL"),
    "generate": ("effects:generate", "generate with features removed or scaled"),
    "graph": ("graph.explain:graph", "explain a prediction by tokens, features and biases"),
    "graph export": ("graph.pages:export", "write graphs as pages, or for other viewers"),
    "graph serve": ("graph.pages:serve", "serve the pages of graphs to this machine"),
    "data prepare": ("data:prepare", "select training and validation conversations"),
    "data inspect": ("data:inspect", "show how a run would read a data set"),
    "export": ("export:export", "write a run as one checkpoint, or in another format"),
    "import": ("export:import_", "read SAEs or transcoders of another project"),
    "push": ("export:push", "push a run to the Hugging Face hub, with a model card"),
    "doctor": ("doctor:doctor", "show what will be used on this machine, and check the kernels"),
}
#: Commands that print their help if they are called without arguments.
_HELPFUL = ("contrast", "eval", "generate", "intervene", "push", "study", "trace", "where")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Unexpected exceptions keep their traceback."""
    from fastadapt.io.names import unusable_path

    write_any_text()
    show_warnings()
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except (UserError, RunError) as error:
        from fastadapt.distributed.ranks import should_report

        if should_report(error):
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

    module, function = COMMANDS[name][0].split(":")
    return Command(f"fastadapt {name}", getattr(import_module(f"fastadapt.cli.{module}"), function))


def _dispatch(argv: list[str]) -> int:
    first = argv[0] if argv else "--help"
    group = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if first in COMMANDS and " ".join(argv[:2]) not in group:
        group = []  # `graph` is a command and a group: `graph RUN`, `graph serve`
    n_words = 2 if group else 1
    if first == "--version":
        print(f"fastadapt {__version__}")
        return 0
    if first in ("-h", "--help") or (group and argv[1:2] in ([], ["-h"], ["--help"])):
        _print_commands(group or list(COMMANDS), first if group else "")
        return 0
    name, arguments = " ".join(argv[:n_words]), argv[n_words:]
    if name not in COMMANDS:
        from fastadapt.cli.parser import nearest

        known = [command.split()[n_words - 1] for command in group or COMMANDS]
        see = f"fastadapt {first} --help" if group else "fastadapt --help"
        hint = nearest(argv[n_words - 1], known)
        raise UserError(f"unknown command {name!r}{hint} (see {see})")

    from fastadapt.distributed.ranks import exit_process

    return exit_process(open_command(name).run(arguments or ["--help"] * (name in _HELPFUL)))


def _print_commands(names: Sequence[str], group: str) -> None:
    prog = f"fastadapt {group}".rstrip()
    print(f"usage: {prog} COMMAND ...\n")
    for name in names:
        print(f"  {name.removeprefix(f'{group} '):<18} {COMMANDS[name][1]}")
    print(f"\n{prog} COMMAND --help shows its options; fastadapt --version shows the version.")
