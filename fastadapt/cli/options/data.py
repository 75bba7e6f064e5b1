"""What can be typed after `fastadapt data`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from jsonargparse import Namespace

from fastadapt.cli.options.parser import Parser, trust_flag
from fastadapt.data.prepare.selection import PrepareConfig

PREPARE_FLAGS = {
    "--resume": "go on with the selection in --output that was not finished",
    "--overwrite": "remove the selection in --output first",
    "--allow_fewer": "take what there is where a domain cannot fill its quota",
}


def data_parser() -> Parser:
    """The parser of `fastadapt data`: one option per field of the selection's configuration."""
    parser = Parser(prog="fastadapt data", description="Data sets for training.")
    commands = parser.add_subcommands(required=True)
    prepare = Parser(
        description="Select training and validation conversations: streamed, filtered, by domain, "
        "in a seeded order, no prompt in both. Without options, the selection of arXiv 2602.20904."
    )
    prepare.add_argument(
        "source",
        type=str,
        nargs="?",
        default=PrepareConfig.source,
        metavar="SOURCE",
        help="hub id, or .jsonl or .parquet file, or folder of such files (default: %(default)s)",
    )
    prepare.add_class_arguments(PrepareConfig, skip={"source", "allow_fewer"})
    for flag, told in PREPARE_FLAGS.items():
        prepare.add_argument(flag, action="store_true", default=False, help=told)
    trust_flag(prepare)
    commands.add_subcommand("prepare", prepare, help="select from a data set")
    return parser


def parse_prepare(argv: Sequence[str]) -> tuple[PrepareConfig, Namespace]:
    """The selection and the flags beside it, from what follows `fastadapt data`.

    Raises:
        UserError: an unknown option or an impossible value.
    """
    # --max-tokens is as good as --max_tokens.
    spelled = [re.sub(r"^--[^=]*", lambda name: _underscored(name[0]), a) for a in argv]
    values = data_parser().parse_args(spelled)["prepare"].as_dict()
    names = {field.name for field in dataclasses.fields(PrepareConfig)}
    flags = Namespace({name: values[name] for name in ("resume", "overwrite", "trust_remote_code")})
    return PrepareConfig(**{key: values[key] for key in names}), flags


def _underscored(option: str) -> str:
    return "--" + option[2:].replace("-", "_")
