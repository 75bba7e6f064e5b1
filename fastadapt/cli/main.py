"""The command line; it and the `cli_*` beside it are the only places that print.

Results go to standard output, progress and errors to standard error. Exit code 0: done, or stopped
by a signal with everything saved; 1: a failure on the way; 2: what was asked cannot be done.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastadapt.cli.console import (
    is_unicode,
    print_error,
    print_table,
    quiet_transformers,
    say,
    write_any_text,
)
from fastadapt.cli.eval import evaluate
from fastadapt.cli.features import features, intervene
from fastadapt.cli.options.parser import (
    USAGE,
    doctor_parser,
    export_parser,
    nearest,
    resume_command,
)
from fastadapt.cli.options.train import parse_train, train_parser
from fastadapt.cli.organism import organism
from fastadapt.distributed.ranks import leads, leave, tells
from fastadapt.errors import RunError, UserError
from fastadapt.io.names import unusable_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; what is no one's mistake keeps its traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    write_any_text()
    try:
        return leave(_dispatch(arguments))
    except (UserError, RunError) as error:
        if tells(error):
            print_error(str(error))
        return error.exit_code
    except SystemExit as end:  # --help
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


def _dispatch(argv: list[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"fastadapt {version('fastadapt')}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)} (see fastadapt --help)")
    return COMMANDS[name](rest)


# --- train ----------------------------------------------------------------------------------------


def train(argv: list[str]) -> int:
    """`fastadapt train`."""
    if {"-h", "--help"} & set(argv):
        train_parser().print_help()
        return 0
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
    from fastadapt.training.trainer import train as run_training

    quiet_transformers()
    say("Loading models and data ...")
    with Progress(sys.stderr) as progress:
        how = {"resume": flags.resume, "overwrite": flags.overwrite}
        summary = run_training(config, **how, sinks=[progress.record])
    if not leads():
        return 0
    if summary["interrupted"]:
        return _stopped(summary, argv)
    _print_summary(summary)
    return 0


def _stopped(summary: dict[str, Any], argv: list[str]) -> int:
    """A signal came and everything is saved: say how to go on."""
    from fastadapt.training.report import write_report

    print(f"Stopped at step {summary['step']} of {summary['steps']}; everything up to it is saved.")
    print(f"Go on with:  {resume_command(argv)}")
    print(f"So far:      {write_report(summary['output'])}")
    return 0


def _print_summary(summary: dict[str, Any]) -> None:
    from fastadapt.reporting.formatting import duration, number, percent
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
    print(f"adapter: {summary['adapter']}")
    print(f"report:  {Path(summary['report']).resolve()}")


def _print_plan(config: Any, gpu: str | None, gpus: int, *, as_json: bool) -> int:
    from fastadapt.training.planning.estimate import as_json as to_json
    from fastadapt.training.planning.estimate import gb, plan, predict, remedies

    planned = plan(config, gpu, gpus)
    if as_json:
        print(json.dumps(to_json(config, planned), indent=2))
        return 0
    device = planned.device
    for title, sizes in (("memory, by part", planned.parts), ("by phase", planned.phases)):
        print_table([title, "at most"], [[name, gb(size)] for name, size in sizes.items()])
        print()
    print(
        f"Peak: {gb(planned.peak_bytes)}, in {planned.peak_phase}, for sequences of up to "
        f"{planned.tokens_per_sequence:,} tokens, with objective.checkpoint {planned.checkpoint}."
    )
    name = device.name if gpus == 1 else f"each of {gpus} {device.name}"
    usable = f"{gb(device.usable_bytes)} of the {gb(device.memory_bytes)} of {name}"
    print(f"It {'fits' if planned.fits else 'DOES NOT FIT'} into {usable}.")
    if not planned.fits:
        found = [[name, gb(size)] for name, size in remedies(config, planned)]
        print_table(["with", "peak"], found)
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
        at_l0 = f" at L0 {predicted.l0:g} (more at the first steps, whose products are dense)"
    print(
        f"Prediction: {predicted.flops_per_step / 1e12:,.4g} TFLOP a step{at_l0}, "
        f"{predicted.step_s:.3g} s, "
        f"{predicted.hours:.3g} h for the run, at {device.flops_per_s / 1e12:.4g} TFLOP/s of "
        f"{device.name} ({device.source})."
    )
    return 0


# --- data -----------------------------------------------------------------------------------------


def data(argv: list[str]) -> int:
    """`fastadapt data`."""
    from fastadapt.cli.options.data import data_parser, parse_prepare

    if not argv:
        data_parser().print_help()
        return 0
    config, flags = parse_prepare(argv)

    from fastadapt.cli.progress import stoppable
    from fastadapt.data.prepare import prepare
    from fastadapt.data.prepare.report import summary
    from fastadapt.organism import resolve

    quiet_transformers()
    config = dataclasses.replace(config, tokenizer=resolve(config.tokenizer))
    with stoppable() as (stop, progress):
        made = prepare(
            config,
            resume=flags.resume,
            overwrite=flags.overwrite,
            trust_remote_code=flags.trust_remote_code,
            sink=progress.record,
            stop=stop,
        )
    if made["interrupted"]:
        print(f"Stopped after {made['rows']:,} rows; what they gave is kept.")
        print(f"Go on with:  {resume_command(argv[1:], ('data', 'prepare'))}")
        return 0
    for head, rows in summary(made):
        print_table(head, rows)
        print()
    for name in made["files"]:
        print(f"{name}: {(Path(made['output']) / name).resolve()}")
    return 0


# --- doctor ---------------------------------------------------------------------------------------


def doctor(argv: list[str]) -> int:
    """`fastadapt doctor`."""
    options = doctor_parser().parse_args(argv)

    from fastadapt.cli.doctor import diagnose

    diagnosis = diagnose()
    if options.json:
        print(json.dumps(diagnosis, indent=2))
    else:
        _print_diagnosis(diagnosis)
    return 0 if diagnosis["ok"] else RunError.exit_code


def _print_diagnosis(diagnosis: dict[str, Any]) -> None:
    from fastadapt.cli.doctor import summary

    print_table(["hardware", ""], list(map(list, diagnosis["hardware"].items())), left=True)
    print()
    found = [[name, found or "not installed"] for name, found in diagnosis["versions"].items()]
    print_table(["versions", ""], found, left=True)
    print()
    chosen = [[c["what"], c["choice"], c["why"]] for c in diagnosis["choices"]]
    print_table(["auto means", "", "because"], chosen, left=True)
    print()
    head = ["kernel", "", "", "", "cases", "check", "of the allowed error"]
    print_table(head, summary(diagnosis["checks"]), left=True)
    for note in diagnosis["notes"]:
        print(f"\n{note}")


def export(argv: list[str]) -> int:
    """`fastadapt export`."""
    from fastadapt.cli.export import convert

    quiet_transformers()
    print(f"Load it with:  {convert(**export_parser().parse_args(argv).as_dict())}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "features": features,
    "intervene": intervene,
    "export": export,
    "data": data,
    "organism": organism,
    "doctor": doctor,
}
