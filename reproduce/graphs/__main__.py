"""Measure graphs over places of a run: ``python -m reproduce.graphs effects | shares | gate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastadapt.cli.console import print_table, quiet_transformers, say
from fastadapt.effects.run import load_run
from fastadapt.graphs.evidence import EvidenceConfig
from fastadapt.graphs.graph import GraphConfig
from fastadapt.reporting.formatting import number
from reproduce.command import run


def main(argv: list[str]) -> int:
    """Run a command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.graphs", description="Measurements of attribution graphs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text, places in (
        ("effects", "predicted against measured effects of features", 50),
        ("shares", "where the relevance of hesitation features comes from", 100),
        ("gate", "paths from the marker of the gated pair to the correction of slips", 50),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("run", help="folder of a trained run")
        command.add_argument("--out", type=Path, help="JSON file to write")
        command.add_argument("--places", type=int, default=places, help="number of places")
        command.add_argument("--seed", type=int, default=0, help="seed of all random draws")
        if name == "effects":
            command.add_argument("--ablations", type=int, default=48, help="features per place")
            command.add_argument("--stream", default="replacement", help="replacement or target")
        elif name == "gate":
            command.add_argument("--nodes", type=int, default=128, help="features to expand")
        else:
            command.add_argument("--top", type=int, default=1, help="promoted tokens that count")
    options = parser.parse_args(argv)
    quiet_transformers()
    result = {"effects": _effects, "shares": _shares, "gate": _gate}[options.command](options)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        say(f"written to {options.out.resolve()}")
    return 0


def _effects(options: argparse.Namespace) -> dict[str, Any]:
    from reproduce.graphs.effects import PREDICTORS, measure_effects

    result = measure_effects(
        load_run(options.run, dtype="float64", device="cpu"),
        options.places,
        EvidenceConfig(options.ablations, seed=options.seed, resamples=200),
        stream=options.stream,
        progress=lambda done: say(f"{done} of {options.places} places"),
    )
    for sample in result["samples"]:
        rows = []
        for predictor in PREDICTORS:
            cells = []
            for measure in ("spearman", "pearson"):
                cells.append(_interval(sample[measure]["mean"][predictor]))
                above = sample[measure]["graph minus"].get(predictor)
                cells.append("–" if above is None else _interval(above))
            rows.append([predictor, *cells])
        head = f"{result['ablations']} {sample['name']} features, {result['places']} places"
        print_table([head, "Spearman", "graph minus", "Pearson", "graph minus"], rows)
        print()
    print(
        f"Later adapters undo {_interval(result['returned'])} of the strongest features' effects."
    )
    return result


def _shares(options: argparse.Namespace) -> dict[str, Any]:
    from reproduce.graphs.shares import measure_shares

    result = measure_shares(
        load_run(options.run, dtype="float64", device="cpu"),
        options.places,
        top=options.top,
        seed=options.seed,
        progress=lambda done: say(f"{done} of {options.places} places"),
    )
    shares = result["shares"]
    names = list(next(iter(shares.values()), {}))
    head = f"absolute edges into a feature, {result['places']} places"
    print_table(
        [head, *(f"{name} features" for name in shares)],
        [[name, *(_interval(parts[name]) for parts in shares.values())] for name in names],
    )
    return result


def _gate(options: argparse.Namespace) -> dict[str, Any]:
    from reproduce.graphs.gate import CASES, MEASURES, measure_gate

    result = measure_gate(
        load_run(options.run, dtype="float64", device="cpu"),
        options.places,
        GraphConfig(nodes=options.nodes),
        seed=options.seed,
        progress=lambda done: say(f"{done} of {options.places} places"),
    )
    for pool in result["paths"]:
        shares, least = pool["shares"], pool["groups"]
        rows = [[name, *(_interval(shares[name][case]) for case in CASES)] for name in MEASURES]
        groups = "one group or more" if least == 1 else f"{least} groups or more"
        head = f"{pool['strongest']} strongest paths of {groups}, {result['places']} places"
        print_table([head, *CASES], rows)
        print()
    print(
        f"{len(result['gate features'])} features of the gate: {' '.join(result['gate features'])}"
        f"\n{result['hesitation features']} features of hesitation. P(wait): "
        + ", ".join(f"{number(value, 3)} ({case})" for case, value in result["P(wait)"].items())
    )
    return result


def _interval(value: dict[str, Any]) -> str:
    ends = (value["mean"], value["low"], value["high"])
    mean, low, high = ("–" if end is None else number(end, 2) for end in ends)
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    run(main)
