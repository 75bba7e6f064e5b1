"""What can be typed after `fastadapt features` and `fastadapt intervene`."""

from __future__ import annotations

import typing
from dataclasses import fields
from typing import Any, TypeVar

import docstring_parser
from jsonargparse import Namespace

from fastadapt.cli.options.parser import Parser, trust_flag
from fastadapt.errors import UserError

Config = TypeVar("Config")

FEATURES_USAGE = """\
usage: fastadapt features COMMAND RUN ...

  collect RUN            where each feature fires: counts, and examples; a store in RUN/features
  merge SHARD [SHARD..]  one store out of several shards
  export RUN             pages to browse the features, which open as files
  serve RUN              the same pages at an address of this machine
  describe RUN           descriptions by a judge, scored by detection on texts held out from it
  classify RUN           what features are about: language, domain, reasoning
  overlap RUN            whether features fire on the same tokens in the target, and in the base
  select RUN NAME        a named set of features: by what they promote, where they fire, SQL, ...
  sets RUN               the sets that there are
  check RUN              whether every file is what was collected, and every row can be

fastadapt features COMMAND --help tells the options of each."""


def config_of(typed: Namespace, kind: type[Config]) -> Config:
    """The configuration whose fields were typed as options of the same names."""
    from fastadapt.training.config import from_dict

    told = typed.as_dict()
    made: Config = from_dict({f.name: told[f.name] for f in fields(kind)}, kind)  # type: ignore[arg-type]
    return made


def collect_parser() -> Parser:
    """The parser of `fastadapt features collect`."""
    from fastadapt.features.collect import CollectConfig

    parser = Parser(
        prog="fastadapt features collect",
        description="Read held-out conversations through a run's replacement model and keep where "
        "each feature fires. Called again it goes on where it was.",
    )
    parser.add_argument("run", metavar="RUN", type=str, help="folder of a finished run")
    _path(parser, "output", "folder of the store; features in the run if not given")
    _path(parser, "shard", "i/n: this part of the texts only, 0/4 to 3/4; then merge them")
    _model(parser)
    _overwrite(parser, "remove what was collected there otherwise")
    parser.add_class_arguments(CollectConfig)
    return parser


def merge_parser() -> Parser:
    """The parser of `fastadapt features merge`."""
    parser = Parser(
        prog="fastadapt features merge",
        description="Make one store of all shards: the same as of a single pass.",
    )
    parser.add_argument("shards", metavar="SHARD", nargs="+", type=str, help="their folders")
    parser.add_argument("--output", type=str, required=True, help="folder of the store")
    _overwrite(parser, "remove what is there")
    return parser


def pages_parser(command: str) -> Parser:
    """The parsers of `fastadapt features export` and `serve`."""
    told = {
        "export": "Write the pages of a store: open index.html in a browser.",
        "serve": "Show the pages of a store on this machine alone, until Ctrl-C.",
    }
    parser = Parser(prog=f"fastadapt features {command}", description=told[command])
    _source(parser)
    if command == "export":
        _path(parser, "output", "folder to write; site in the store if not given")
    else:
        from fastadapt.features.site.server import PORT

        parser.add_argument("--port", type=int, default=PORT, help="to listen at; 0: any free one")
    return parser


def judged_parser(command: str) -> Parser:
    """The parsers of `fastadapt features describe` and `classify`."""
    from fastadapt.features.autointerp.judges.settings import (
        ClassifyConfig,
        DescribeConfig,
        JudgeConfig,
    )

    told = {
        "describe": "Let a judge describe features from examples, and score each description on "
        "texts that it was not shown: which of them fire the feature? Without --judge.model (or "
        "OPENAI_MODEL) the judge is one that needs no language model.",
        "classify": "Let a language model say of features whether they are about language, a "
        "domain, or reasoning.",
    }
    parser = Parser(prog=f"fastadapt features {command}", description=told[command])
    _source(parser)
    if command == "describe":
        _model(parser, dtype="as collected")
    parser.add_argument(
        "--yes", action="store_true", default=False, help="agree to the costs beforehand"
    )
    parser.add_class_arguments(JudgeConfig, "judge")
    parser.add_class_arguments(DescribeConfig if command == "describe" else ClassifyConfig, command)
    return parser


def overlap_parser() -> Parser:
    """The parser of `fastadapt features overlap`."""
    from fastadapt.features.overlap import OverlapConfig

    parser = Parser(
        prog="fastadapt features overlap",
        description="Of the tokens on which a feature fires most, how many are the same when its "
        "encoder reads the target, and when it reads the base (arXiv 2602.20904, appendix G)?",
    )
    parser.add_argument("run", metavar="RUN", type=str, help="a run whose features were collected")
    _path(parser, "store", "of the features; features in the run if not given")
    _model(parser, dtype="as collected")
    parser.add_class_arguments(OverlapConfig)
    return parser


def select_parser() -> Parser:
    """The parser of `fastadapt features select`."""
    from fastadapt.features.store.selection import SelectConfig

    parser = Parser(
        prog="fastadapt features select",
        description="Select features in one way and keep them as a named set; sets combine.",
    )
    _source(parser)
    parser.add_argument("name", metavar="NAME", type=str, help="of the set")
    _overwrite(parser, "replace a set of this name")
    hints, told = (
        typing.get_type_hints(SelectConfig),
        docstring_parser.parse_from_object(SelectConfig),
    )
    helps = {name: p.description for p in told.params for name in p.arg_name.split(", ")}
    for field in fields(SelectConfig):
        option, kind = f"--{field.name}", hints[field.name]
        if kind is bool:
            parser.add_argument(option, action="store_true", default=False, help=helps[field.name])
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(option, nargs="+", type=str, default=[], help=helps[field.name])
        else:
            parser.add_argument(option, type=kind, default=field.default, help=helps[field.name])
    return parser


def sets_parser() -> Parser:
    """The parser of `fastadapt features sets`."""
    parser = Parser(prog="fastadapt features sets", description="The sets that a store has.")
    _source(parser)
    return parser


def check_parser() -> Parser:
    """The parser of `fastadapt features check`."""
    parser = Parser(
        prog="fastadapt features check",
        description="Hold every file of a store against its size and SHA-256 in the manifest, and "
        "every row against the others. Exit code 1 where anything is wrong.",
    )
    _source(parser)
    return parser


def intervene_parser() -> Parser:
    """The parser of `fastadapt intervene`."""
    parser = Parser(
        prog="fastadapt intervene",
        usage="fastadapt intervene RUN (--ablate SET | --only SET | --onto-target SET "
        "[--scale X]) --output FOLDER",
        description="Change a run's adapter and keep it as a run of its own, which evaluation, "
        "generation and serving take as any other.",
    )
    parser.add_argument("run", metavar="RUN", type=str, help="a run whose features were collected")
    for name, told in (
        ("ablate", "remove these features"),
        ("only", "keep these features alone"),
        ("onto_target", "add these features, scaled, to the target itself"),
    ):
        option = name.replace("_", "-")
        parser.add_argument(
            f"--{option}",
            metavar="SET",
            type=typing.Optional[str],  # noqa: UP045
            default=None,
            help=f"{told}: a set of the run, or its file",
        )
    scale: Any = typing.Optional[float]  # noqa: UP045
    parser.add_argument("--scale", type=scale, default=None, help="of --onto-target; -0.5")
    parser.add_argument("--output", type=str, required=True, help="a new folder")
    _path(parser, "store", "of the features; features in the run if not given")
    _overwrite(parser, "replace what an earlier intervention wrote there")
    return parser


def chosen_intervention(typed: Namespace) -> tuple[str, str]:
    """Which of the three was typed, and of which set.

    Raises:
        UserError: none or several of them.
    """
    names = ("ablate", "only", "onto_target")
    given = [(name.replace("_", "-"), typed[name]) for name in names if typed[name] is not None]
    if len(given) != 1:
        got = ", ".join(f"--{name}" for name, _ in given) or "none"
        raise UserError(f"expected one of --ablate, --only, --onto-target, got {got}")
    return given[0]


def _source(parser: Parser) -> None:
    parser.add_argument(
        "source", metavar="RUN", type=str, help="a run whose features were collected, or a store"
    )


def _model(parser: Parser, *, dtype: str = "as in training") -> None:
    _path(parser, "dtype", f"of weights and streams; by default {dtype}")
    _path(parser, "device", "to run on; by default as in training")
    trust_flag(parser)


def _path(parser: Parser, name: str, told: str) -> None:
    optional: Any = typing.Optional[str]  # noqa: UP045
    parser.add_argument(f"--{name}", type=optional, default=None, help=told)


def _overwrite(parser: Parser, told: str) -> None:
    parser.add_argument("--overwrite", action="store_true", default=False, help=told)
