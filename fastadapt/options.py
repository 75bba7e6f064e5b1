"""What can be typed after `fastadapt`: the parsers, made from the configuration's dataclasses.

A run's configuration is a preset's or a YAML file's, with the options that were typed written over
it; `fastadapt.training.config.from_dict` then has the one word on what is allowed.
"""

from __future__ import annotations

import dataclasses
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
from jsonargparse import ArgumentParser, Namespace

from fastadapt.errors import UserError

if typing.TYPE_CHECKING:
    from fastadapt.training.config import TrainConfig

PRESETS = Path(__file__).parent / "presets"

USAGE = """\
usage: fastadapt COMMAND ...

  train PRESET_OR_YAML   train transcoder adapters on a model pair
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


class Parser(ArgumentParser):
    """Raises :class:`UserError` where argparse prints and exits; takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "print_config": None, **kwargs})

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
        return flat


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean ...?` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def preset_names() -> list[str]:
    """Names of the presets that the package ships."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def find_config(name: str) -> Path:
    """The file of a preset, by its name, or of a YAML file, by its path.

    Raises:
        UserError: neither a preset nor a file, such as a folder.
    """
    if name in preset_names():
        return PRESETS / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a YAML file or a preset ({_known()})")
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise UserError(f"{name}: no such file; give a YAML file or a preset ({_known()})")
    hint = nearest(name, preset_names()) or "."
    raise UserError(f"{name}: no such preset{hint} Known: {_known()}")


def _known() -> str:
    return ", ".join(preset_names())


def train_parser() -> Parser:
    """The parser of `fastadapt train`: one option per field of the configuration."""
    from fastadapt.training.config import TrainConfig

    parser = Parser(
        prog="fastadapt train",
        usage="fastadapt train PRESET_OR_YAML [--COMPONENT.KEY VALUE ...] "
        + " ".join(f"[{flag}]" for flag in TRAIN_FLAGS),
        description="Train transcoder adapters on a model pair, into a run directory. What is "
        "typed wins over the preset or file, and that over the defaults below.",
    )
    parser.add_argument(
        "config", metavar="PRESET_OR_YAML", help=f"a preset ({_known()}) or a YAML file"
    )
    for flag, told in TRAIN_FLAGS.items():
        parser.add_argument(flag, action="store_true", default=False, help=told)
    parser.add_argument("--gpu", type=str, default=None, help=PLAN_GPU)
    parser.add_argument("--gpus", type=int, default=None, help=PLAN_GPUS)
    for name, kind in typing.get_type_hints(TrainConfig).items():
        parser.add_class_arguments(kind, name)
    return parser


PLAN_GPUS = "with --dry-run: plan for so many GPUs that share the run"
PLAN_GPU = "with --dry-run: plan for this GPU (a100, h100, h200) instead of this machine"

TRAIN_FLAGS = {
    "--resume": "go on with the run in run.output, from its newest checkpoint",
    "--overwrite": "remove the run in run.output first",
    "--dry-run": "print what the run would need (memory, work, hours, disk) and stop; no weights "
    "are read, nothing is fetched for a preset",
    "--json": "with --dry-run: print one JSON object",
    "--print_config": "print the whole configuration as YAML and stop",
}


def parse_train(argv: Sequence[str]) -> tuple[TrainConfig, Namespace]:
    """The configuration of a run and the flags beside it, from the arguments of `fastadapt train`.

    Raises:
        UserError: an unknown option, preset or key, or an impossible value.
    """
    from fastadapt.training.config import from_dict

    parser = train_parser()
    # Only what was typed: defaults come from the file, and below it from the dataclasses.
    typed = parser.parse_args(argv, defaults=False, _skip_validation=True)
    if typed.get("config") is None:
        parser.error(f"PRESET_OR_YAML is missing; presets: {_known()}")
    values = read_yaml(find_config(typed.config))
    flags = Namespace(config=typed.config)
    for flag in TRAIN_FLAGS:
        name = flag.lstrip("-").replace("-", "_")
        flags[name] = bool(typed.get(name))
    flags.gpu, flags.gpus = typed.get("gpu"), typed.get("gpus")
    for name in ("json", "gpu", "gpus"):
        if flags[name] is not None and flags[name] is not False and not flags.dry_run:
            parser.error(f"--{name} goes with --dry-run")
    for component, fields in typed.as_dict().items():
        if isinstance(fields, dict):
            below = values.setdefault(component, {})
            if not isinstance(below, dict):
                raise UserError(f"{component}: expected keys, got {below!r}")
            below.update({key: _plain(value) for key, value in fields.items()})
    return from_dict(values), flags


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


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
        UserError: unreadable, no YAML, or not keys with values.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys with values, got {type(values).__name__}")
    return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def organism_parser() -> Parser:
    """The parser of `fastadapt organism`."""
    parser = Parser(prog="fastadapt organism", description="The embedded model pair.")
    commands = parser.add_subcommands(required=True)
    build = Parser(description="Train both models of the pair again, from the seeded recipe.")
    build.add_argument("--out", type=str, required=True, help="folder to write the pair into")
    build.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    build.add_argument("--overwrite", action="store_true", help="write into a folder in use")
    commands.add_subcommand("build", build, help="train both models again")
    check = Parser(description="Measure whether a pair is what it must be.")
    check.add_argument("--folder", type=str, default=None, help="a pair; default: the shipped one")
    commands.add_subcommand("check", check, help="measure the pair")
    sample = Parser(description="Print problems and how a model of the shipped pair answers them.")
    sample.add_argument(
        "--model",
        type=typing.Literal["target", "base", "hybrid"],
        default="target",
        help="the hybrid is the target with the base's MLPs",
    )
    sample.add_argument("--n", type=int, default=3, help="number of problems")
    sample.add_argument("--seed", type=int, default=0, help="of the problems and the sampling")
    commands.add_subcommand("sample", sample, help="problems and answers")
    return parser


def export_parser() -> Parser:
    """The parser of `fastadapt export`."""
    from fastadapt.conversion import Format

    parser = Parser(
        prog="fastadapt export",
        description="Write a run (or a folder of adapters) as one checkpoint, tensor by tensor; or "
        "read the adapters of a checkpoint published with arXiv 2602.20904 (--format adapters).",
    )
    parser.add_argument("source", metavar="RUN", type=str, help="a run, adapters, or a checkpoint")
    parser.add_argument("--output", type=str, required=True, help="a new folder")
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
