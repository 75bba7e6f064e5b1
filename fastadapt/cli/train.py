"""`fastadapt train`: read a configuration from presets, files and options, and train.

Later presets and files override earlier ones, and typed options override both.
`fastadapt.training.config.from_dict` checks the values. An overlay is a preset that holds only
changes and needs a preset or file before it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fastadapt.cli.console import is_unicode, print_table, quiet_transformers, say
from fastadapt.cli.parser import HELP_FLAGS, Parser, add_components, nearest, resume_command
from fastadapt.errors import UserError
from fastadapt.io.documents import parse_yaml, read_yaml
from fastadapt.io.names import typed_path

if typing.TYPE_CHECKING:
    from fastadapt.training.config import TrainConfig
    from fastadapt.training.planning.devices import Device
    from fastadapt.training.planning.estimate import Prediction

PRESETS = Path(__file__).parents[1] / "presets"
#: ``overlays/NAME.yaml``; ``overlays/PRESET/NAME.yaml`` overrides it for one preset.
OVERLAYS = PRESETS / "overlays"

TRAIN_FLAGS = {
    "--resume": "resume the run in run.output from its newest checkpoint",
    "--overwrite": "remove the run in run.output first",
    "--dry-run": "print the memory, compute, hours and disk of the run and stop; reads no weights, "
    "and downloads nothing for a preset",
    "--json": "with --dry-run: print one JSON object",
    "--print_config": "print the whole configuration as YAML and stop",
}


def preset_names() -> list[str]:
    """Return the names of the shipped presets that are complete."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def overlay_names() -> list[str]:
    """Return the names of the shipped overlays."""
    return sorted(path.stem for path in OVERLAYS.glob("*.yaml"))


def find_config(name: str) -> Path:
    """Return the file of a preset, by its name, or of a YAML file, by its path.

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
    return f"{', '.join(preset_names())}; overlays: {', '.join(overlay_names())}"


def train_parser() -> Parser:
    """Build the parser of `fastadapt train`: one option per field of the configuration."""
    from fastadapt.training.config import TrainConfig

    parser = Parser(
        prog="fastadapt train",
        usage="fastadapt train PRESET_OR_YAML [PRESET_OR_YAML ...] [--COMPONENT.KEY VALUE ...] "
        + " ".join(f"[{flag}]" for flag in TRAIN_FLAGS),
        description="Train transcoder adapters, or a baseline, on a model pair, into a run "
        "directory. Typed options win over presets and files, a later one of these over an "
        "earlier one, and all of them over the defaults below. If no later one names run.output, "
        "its name is appended to the folder: `fastadapt train organism no-bridge` writes "
        "runs/organism-no-bridge.",
    )
    parser.add_argument(
        "config",
        metavar="PRESET_OR_YAML",
        nargs="+",
        help=f"a preset ({', '.join(preset_names())}) or a YAML file; then overlays: presets "
        f"({', '.join(overlay_names())}) or YAML files",
    )
    for flag, text in TRAIN_FLAGS.items():
        parser.add_argument(flag, action="store_true", default=False, help=text)
    with_gpu = "with --dry-run: plan for this GPU (a100, h100, h200) instead of this machine"
    parser.add_argument("--gpu", type=str, default=None, help=with_gpu)
    with_gpus = "with --dry-run: plan for this number of GPUs that share the run"
    parser.add_argument("--gpus", type=int, default=None, help=with_gpus)
    # A mixture is written in a file; typed, the data are one source.
    add_components(parser, TrainConfig, {"data": {"train"}})
    source = "training data: file, folder or hub id; in a YAML file also a list of sources"
    parser.add_argument("--data.train", type=str, help=source)
    parser.add_argument("--adapter.kind", type=str, help="former name of --run.trains")
    former = "former form of --data.loss: true is all, false is assistant"
    parser.add_argument("--data.train_on_prompt", type=bool, help=former)
    return parser


def parse_train(argv: Sequence[str]) -> tuple[TrainConfig, Namespace]:
    """Parse the arguments of `fastadapt train` into a configuration and flags such as --resume.

    Raises:
        UserError: an unknown option, preset or key, or an impossible value.
    """
    from fastadapt.training.config import from_dict

    parser = train_parser()
    # Without defaults: unset options take the files' values, or else those of the dataclasses.
    typed = parser.parse_args(argv, defaults=False, _skip_validation=True)
    if not typed.get("config"):
        parser.error(f"PRESET_OR_YAML is missing; presets: {_known()}")
    values = read_configs(typed.config)
    names = [flag.lstrip("-").replace("-", "_") for flag in TRAIN_FLAGS]
    flags = Namespace({name: bool(typed.get(name)) for name in names})
    flags.gpu, flags.gpus = typed.get("gpu"), typed.get("gpus")
    for name in ("json", "gpu", "gpus"):
        if flags[name] not in (None, False) and not flags.dry_run:
            parser.error(f"--{name} goes with --dry-run")
    write_typed(values, components_of(typed), argv, typed.config)
    return from_dict(values), flags


def components_of(typed: Namespace) -> dict[str, Any]:
    """Return the options ``--component.key`` of the command line, by component."""
    return {name: keys for name, keys in typed.as_dict().items() if isinstance(keys, dict)}


def write_typed(
    values: dict[str, Any],
    components: Mapping[str, Any],
    argv: Sequence[str],
    files: Sequence[str],
) -> None:
    """Replace values of files by options of the command line, the only source of trust in code.

    Args:
        values: values of the files by component; changed in place.
        components: the options of the command line, from :func:`components_of`.
        argv: the words of the command line.
        files: names of the files, for the message.

    Raises:
        UserError: a file trusts the code of a model, and no option does.
    """
    from fastadapt.training.config import TRUST, move_old_keys, take_trust

    from_file = take_trust(values)
    _write_over(values, move_old_keys(components))
    trust = _typed_trust(argv)
    # Check again, since `--pair FILE` reads a file, too.
    if trust is None and (take_trust(values) or from_file):
        raise UserError(
            f"pair.{TRUST} is true in a file ({', '.join(files)}). Trust in the code of a "
            f"model is typed, never read from a file: to run that code, type --pair.{TRUST} true"
        )
    if trust is not None and isinstance(values.get("pair"), dict):
        values["pair"][TRUST] = trust


def _typed_trust(argv: Sequence[str]) -> bool | None:
    """Return the value of --pair.trust_remote_code on the command line; None without it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pair.trust_remote_code", dest="trust", default="null")
    typed, _ = parser.parse_known_args(argv)
    return typing.cast("bool | None", parse_yaml(typed.trust, "--pair.trust_remote_code"))


def read_configs(names: Sequence[str]) -> dict[str, Any]:
    """Return the values of presets and files; later ones override earlier ones.

    If a later one does not name ``run.output``, its name is appended to that folder, so that no two
    runs of one preset share a folder.

    Raises:
        UserError: no such preset or file, no YAML, or an overlay without a preset before it.
    """
    first = names[0]
    values = _read_values(find_config(first))
    if first in overlay_names():
        raise UserError(
            f"{first} is an overlay; give a preset or file that names the pair before it: "
            f"fastadapt train {preset_names()[0]} {first}"
        )
    for name in names[1:]:
        paths = [find_config(name)]
        if first in preset_names() and (variant := OVERLAYS / first / f"{name}.yaml").is_file():
            paths.append(variant)
        before = _output(values)
        for path in paths:
            _write_over(values, _read_values(path), f"{path}: ")
        if before is not None and _output(values) == before:
            values["run"]["output"] = f"{before.rstrip('/')}-{Path(name).stem}"
    return values


def _read_values(path: Path) -> dict[str, Any]:
    from fastadapt.training.config import move_old_keys

    values = read_yaml(path, dict[str, Any])
    try:
        return move_old_keys(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _output(values: Mapping[str, Any]) -> str | None:
    run = values.get("run")
    output = run.get("output") if isinstance(run, dict) else None
    return output if isinstance(output, str) else None


def _write_over(values: dict[str, Any], changes: Mapping[str, Any], source: str = "") -> None:
    for component, fields in changes.items():
        below = values.setdefault(component, {})
        for keys in (fields, below):
            if not isinstance(keys, dict):
                raise UserError(f"{source}{component}: expected a mapping, got {keys!r}")
        below.update(fields)


#: Variables from which torch reads the settings of a GPU's allocator, and the setting of a run.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
ALLOCATOR = "expandable_segments:True"


def set_allocator() -> None:
    """Let a GPU's allocator grow its segments, unless an environment variable configures it.

    Batches differ in length, so that the free parts of segments of a fixed size fit no later
    tensor. Torch reads the variable when it is imported or later.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR


# --- the command ----------------------------------------------------------------------------------


def train(argv: list[str]) -> int:
    """Run `fastadapt train`: train adapters as presets, files and options say."""
    if HELP_FLAGS & set(argv):
        train_parser().print_help()
        return 0
    set_allocator()
    config, flags = parse_train(argv)
    if flags.print_config:
        import yaml

        from fastadapt.training.config import to_dict

        # A stand-in for a character would be another configuration; an escape is the same.
        unicode = is_unicode(sys.stdout)
        print(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=unicode), end="")
        return 0
    if flags.dry_run:
        gpus = 1 if flags.gpus is None else flags.gpus
        return _print_plan(config, flags.gpu, gpus, as_json=flags.json)

    from fastadapt.cli.progress import Progress
    from fastadapt.distributed.ranks import is_main
    from fastadapt.training.trainer import train as run_training

    quiet_transformers()
    say("Loading models and data ...")
    with Progress(sys.stderr) as progress:
        summary = run_training(
            config, resume=flags.resume, overwrite=flags.overwrite, sinks=[progress.record]
        )
    if not is_main():
        return 0
    if summary["interrupted"]:
        return _stopped(summary, config, argv)
    _print_summary(summary, config)
    return 0


def _stopped(summary: dict[str, Any], config: TrainConfig, argv: list[str]) -> int:
    """Print where a run was stopped, and the command that resumes it."""
    from fastadapt.training.report import write_report

    print(f"Stopped at step {summary['step']} of {summary['steps']}; finished steps are saved.")
    print(f"Resume with: {resume_command(argv)}")
    if config.run.report:
        print(f"Report:      {write_report(summary['output'])}")
    return 0


def _print_summary(summary: dict[str, Any], config: TrainConfig) -> None:
    from fastadapt.reporting.formatting import duration, number, percent
    from fastadapt.training.logs.hints import hints
    from fastadapt.training.logs.run_log import TRAINED, comparison

    print()
    print_table(*comparison(summary))
    print()
    recovered = percent(summary.get("kl_recovered_vs_hybrid"))
    trained = TRAINED[summary["adapter_kind"]]
    verb = "recovers" if trained == "adapter" else "recover"
    print(f"The {trained} {verb} {recovered} of the hybrid's KL to the target.")
    if per_layer := summary.get("l0_per_layer"):
        print("L0 per layer:", ", ".join(map(number, per_layer)))
    print(f"{number(summary['tokens'])} training tokens in {duration(summary['wall_s'])}")
    for line in hints(summary, config.objective.sparsity, config.objective.l0):
        print(f"hint: {line}")
    print(f"adapter: {summary['adapter']}")
    if "report" in summary:
        print(f"report:  {Path(summary['report']).resolve()}")


def _print_plan(config: Any, gpu: str | None, gpus: int, *, as_json: bool) -> int:
    from fastadapt.training.planning.estimate import as_json as to_json
    from fastadapt.training.planning.estimate import gb, plan, predict, remedies, stays_dense

    planned = plan(config, gpu, gpus)
    if as_json:
        print(json.dumps(to_json(config, planned), indent=2))
        return 0
    device = planned.device
    for title, sizes in (("memory, by part", planned.parts), ("by phase", planned.phases)):
        print_table([title, "at most"], [[name, gb(size)] for name, size in sizes.items()])
        print()
    if planned.recompute:
        heads = ["recomputation, layers by policy", *planned.recompute[0].layers, "peak"]
        rows = [
            [
                f"{each.tokens:,} tokens",
                *(f"{n:.1f}" for n in each.layers.values()),
                gb(each.peak_bytes),
            ]
            for each in planned.recompute
        ]
        print_table(heads, rows)
        products = "whose products are dense" if stays_dense(config) else "with sparse codes"
        print(f"Layers are means over cutoffs, of adapters {products}.\n")
    phase = "" if planned.peak_phase is None else f" in {planned.peak_phase},"
    print(
        f"Peak: {gb(planned.peak_bytes)},{phase} for sequences of up to "
        f"{planned.tokens_per_sequence:,} tokens, with objective.checkpoint {planned.checkpoint}."
    )
    name = device.name if gpus == 1 else f"each of {gpus} {device.name}"
    usable = f"{gb(device.usable_bytes)} of the {gb(device.memory_bytes)} of {name}"
    print(f"It {'fits' if planned.fits else 'DOES NOT FIT'} into {usable}.")
    if not planned.fits:
        smaller = [[name, gb(size)] for name, size in remedies(config, planned)]
        print_table(["with", "peak"], smaller)
    assumed = "" if planned.tokens else ", both assumed: the data are not here"
    print(
        f"{planned.steps:,} steps of {planned.mean_tokens:,} tokens a sequence{assumed}; "
        f"{planned.parameters:,} trained parameters; checkpoints and adapters: "
        f"{gb(planned.disk_bytes)} of disk."
    )
    if planned.host_bytes:
        copied = gb(2 * planned.host_bytes * config.optimizer.accumulation)
        print(f"Host memory: {gb(planned.host_bytes)}, of which a step copies {copied} to the GPU.")
    predicted = predict(config, planned)
    at_l0 = ""
    if predicted.l0 is not None:
        first = "more at the first steps, whose products are dense"
        dense = "without a penalty, products stay dense" if stays_dense(config) else first
        at_l0 = f" at L0 {predicted.l0:g} ({dense})"
    print(
        f"Prediction: {predicted.flops_per_step / 1e12:,.4g} TFLOP a step{at_l0}, "
        f"{_pace(predicted, device)}."
    )
    return 0


def _pace(predicted: Prediction, device: Device) -> str:
    """Describe the time of a step and of the run, and the FLOP rate that it is computed from."""
    rate = f"{device.flops_per_s / 1e12:.4g} TFLOP/s of {device.name} ({device.source})"
    if predicted.share is None:
        here = "" if device.is_here else "; run --dry-run on that machine to measure its share"
        return (
            f"at least {predicted.step_s:.3g} s and {predicted.hours:.3g} h for the run, at all of "
            f"the {rate}, which no run reaches{here}"
        )
    return (
        f"about {predicted.step_s:.3g} s and {predicted.hours:.3g} h for the run, at "
        f"{100 * predicted.share:.0f}% of the {rate}: the share of a step of two layers, timed here"
    )
