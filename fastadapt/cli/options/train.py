"""What can be typed after `fastadapt train`, and the presets that it goes over.

A run's configuration is a preset's or a YAML file's, with further ones written over it in their
order, and over these the options that were typed; `fastadapt.training.config.from_dict` then has
the one word on what is allowed.

Some presets are overlays: they hold only what they change, and go over any preset or file.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fastadapt.cli.options.parser import Parser, nearest
from fastadapt.errors import UserError
from fastadapt.io.documents import parse_yaml, read_yaml
from fastadapt.io.names import typed_path

if typing.TYPE_CHECKING:
    from fastadapt.training.config import TrainConfig

PRESETS = Path(__file__).parents[2] / "presets"
#: ``overlays/NAME.yaml``, and where it goes over a preset that needs other numbers than most,
#: ``overlays/PRESET/NAME.yaml`` over that.
OVERLAYS = PRESETS / "overlays"

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


def preset_names() -> list[str]:
    """Names of the presets that the package ships and that are whole."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def overlay_names() -> list[str]:
    """Names of the presets that go over others."""
    return sorted(path.stem for path in OVERLAYS.glob("*.yaml"))


def find_config(name: str) -> Path:
    """The file of a preset, by its name, or of a YAML file, by its path.

    Raises:
        UserError: neither a preset nor a file, such as a folder.
    """
    for folder, names in ((PRESETS, preset_names()), (OVERLAYS, overlay_names())):
        if name in names:
            return folder / f"{name}.yaml"
    path = typed_path(name, "PRESET_OR_YAML")
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a YAML file or a preset ({_known()})")
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise UserError(f"{name}: no such file; give a YAML file or a preset ({_known()})")
    hint = nearest(name, preset_names() + overlay_names()) or "."
    raise UserError(f"{name}: no such preset{hint} Known: {_known()}")


def _known() -> str:
    return f"{', '.join(preset_names())}; to go over one: {', '.join(overlay_names())}"


def train_parser() -> Parser:
    """The parser of `fastadapt train`: one option per field of the configuration."""
    from fastadapt.training.config import TrainConfig

    parser = Parser(
        prog="fastadapt train",
        usage="fastadapt train PRESET_OR_YAML [PRESET_OR_YAML ...] [--COMPONENT.KEY VALUE ...] "
        + " ".join(f"[{flag}]" for flag in TRAIN_FLAGS),
        description="Train transcoder adapters, or a baseline, on a model pair, into a run "
        "directory. What is typed wins over presets and files, a later one of these over an "
        "earlier one, and all over the defaults below. Where no later one names run.output, its "
        "name is appended to it: `fastadapt train organism no-bridge` writes runs/organism-"
        "no-bridge.",
    )
    parser.add_argument(
        "config",
        metavar="PRESET_OR_YAML",
        nargs="+",
        help=f"a preset ({', '.join(preset_names())}) or a YAML file; after it any that go over "
        f"it: presets made for that ({', '.join(overlay_names())}) or YAML files",
    )
    for flag, told in TRAIN_FLAGS.items():
        parser.add_argument(flag, action="store_true", default=False, help=told)
    parser.add_argument("--gpu", type=str, default=None, help=PLAN_GPU)
    parser.add_argument("--gpus", type=int, default=None, help=PLAN_GPUS)
    for name, kind in typing.get_type_hints(TrainConfig).items():
        parser.add_class_arguments(kind, name)
    return parser


def parse_train(argv: Sequence[str]) -> tuple[TrainConfig, Namespace]:
    """The configuration of a run and the flags beside it, from the arguments of `fastadapt train`.

    Raises:
        UserError: an unknown option, preset or key, or an impossible value.
    """
    from fastadapt.training.config import TRUST, from_dict, take_trust

    parser = train_parser()
    # Only what was typed: defaults come from the files, and below them from the dataclasses.
    typed = parser.parse_args(argv, defaults=False, _skip_validation=True)
    if not typed.get("config"):
        parser.error(f"PRESET_OR_YAML is missing; presets: {_known()}")
    values = read_configs(typed.config)
    from_file = take_trust(values)
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
    trust = _typed_trust(argv)
    # `--pair FILE` reads a file, too.
    if trust is None and (take_trust(values) or from_file):
        raise UserError(
            f"pair.{TRUST} is true in a file ({', '.join(typed.config)}). Trust in the code of a "
            f"model is typed, never read from a file: to run that code, type --pair.{TRUST} true"
        )
    if trust is not None and isinstance(values.get("pair"), dict):
        values["pair"][TRUST] = trust
    return from_dict(values), flags


def _typed_trust(argv: Sequence[str]) -> bool | None:
    """What was typed of trust in the code of models, after the parser accepted all of it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pair.trust_remote_code", dest="trust", default="null")
    typed, _ = parser.parse_known_args(argv)
    return typing.cast("bool | None", parse_yaml(typed.trust, "--pair.trust_remote_code"))


def read_configs(names: Sequence[str]) -> dict[str, Any]:
    """The values of presets and files, each written over those before it.

    Where a later one does not name ``run.output``, it gets that one's name at its end, so that no
    two runs of one preset are in one folder.

    Raises:
        UserError: no such preset or file, no YAML, or an overlay that goes over nothing.
    """
    first = names[0]
    values: dict[str, Any] = read_yaml(find_config(first), dict[str, Any])
    if first in overlay_names():
        raise UserError(
            f"{first} goes over a preset or file that names the pair: fastadapt train "
            f"{preset_names()[0]} {first}"
        )
    for name in names[1:]:
        paths = [find_config(name)]
        if first in preset_names() and (own := OVERLAYS / first / f"{name}.yaml").is_file():
            paths.append(own)
        before = _output(values)
        for path in paths:
            _write_over(values, read_yaml(path, dict[str, Any]), path)
        if before is not None and _output(values) == before:
            values["run"]["output"] = f"{before.rstrip('/')}-{Path(name).stem}"
    return values


def _output(values: Mapping[str, Any]) -> str | None:
    run = values.get("run")
    output = run.get("output") if isinstance(run, dict) else None
    return output if isinstance(output, str) else None


def _write_over(values: dict[str, Any], changes: Mapping[str, Any], path: Path) -> None:
    for component, fields in changes.items():
        below = values.setdefault(component, {})
        if not isinstance(fields, dict) or not isinstance(below, dict):
            raise UserError(f"{path}: {component}: expected keys, got {fields!r}")
        below.update(fields)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
