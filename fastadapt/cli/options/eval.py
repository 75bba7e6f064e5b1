"""What can be typed after `fastadapt eval`."""

from __future__ import annotations

import os
import typing
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from fastadapt.cli.options.parser import Parser, trust_flag
from fastadapt.io.names import typed_path

if typing.TYPE_CHECKING:
    from fastadapt.evaluation.comparison import EvalConfig


def eval_parser() -> Parser:
    """The parser of `fastadapt eval`: one option per field of the evaluation's configuration."""
    from fastadapt.evaluation.comparison import EvalConfig
    from fastadapt.evaluation.folder import PARTS

    parser = Parser(
        prog="fastadapt eval",
        usage="fastadapt eval RUN [RUN ...] [--output FOLDER] [--COMPONENT.KEY VALUE ...]",
        description="Measure how faithful trained runs of one pair are to its target, beside the "
        "base and the hybrid: tables, plots and a page. Called again it goes on where it was, and "
        "repeats nothing.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=str, help="folders of runs")
    parser.add_argument(
        "--output",
        type=typing.Optional[str],  # noqa: UP045
        default=None,
        help="folder to write into; of one run: eval in it, of several: eval beside them",
    )
    parser.add_argument(
        "--names",
        type=typing.Optional[list[str]],  # noqa: UP045
        default=None,
        help="what the runs are called, as [a, b]; by default as their folders",
    )
    parser.add_argument(
        "--parts",
        type=list[typing.Literal[PARTS]],  # type: ignore[valid-type]
        default=list(PARTS),
        help="what is measured: any of outputs, partial, speed, benchmarks; others that were "
        "measured before of the same runs with the same settings stay in eval.json",
    )
    for name, kind in (("dtype", "of weights and streams"), ("device", "to run on")):
        told = f"{kind}; by default as in training"
        parser.add_argument(f"--{name}", type=typing.Optional[str], default=None, help=told)  # noqa: UP045
    trust_flag(parser)
    parser.add_argument(
        "--overwrite", action="store_true", default=False, help="remove what is in --output first"
    )
    for name, kind in typing.get_type_hints(EvalConfig).items():
        skipped = {"sampling", "family"} if name == "benchmarks" else set()
        parser.add_class_arguments(kind, name, skip=skipped)
    return parser


def parse_eval(argv: Sequence[str]) -> tuple[EvalConfig, Namespace]:
    """What is measured, and the flags beside it.

    Raises:
        UserError: an unknown option or an impossible value.
    """
    from fastadapt.evaluation.comparison import EvalConfig
    from fastadapt.training.config import from_dict

    typed = eval_parser().parse_args(argv)
    names = typing.get_type_hints(EvalConfig)
    values = {name: value for name, value in typed.as_dict().items() if name in names}
    return from_dict(values, EvalConfig), typed


def default_output(runs: Sequence[str]) -> Path:
    """``eval`` in the run's folder, or in the folder that holds all of several."""
    folders = [Path(os.path.realpath(typed_path(run, "run"))) for run in runs]
    if len(folders) == 1:
        return folders[0] / "eval"
    return Path(os.path.commonpath([folder.parent for folder in folders])) / "eval"
