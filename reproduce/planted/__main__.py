"""Run the benchmark of planted differences: ``python -m reproduce.planted``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from fastadapt.cli.console import print_table, quiet_transformers, say
from fastadapt.errors import UserError
from reproduce.command import run

if TYPE_CHECKING:
    from reproduce.planted.folder import Part

SCHEMA_VERSION = 1


def main(argv: list[str]) -> int:
    """Run the benchmark, or resume it; return the exit code."""
    import torch

    from reproduce.parts import fill, missing
    from reproduce.planted.folder import open_folder, parts_of
    from reproduce.planted.organisms import SIZES

    options = _options(argv, tuple(SIZES))
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    quiet_transformers()
    torch.set_num_threads(1)  # as the preset's; equal bits need equal threads
    open_folder(options.out, options.size, is_new=not options.summary)
    parts = parts_of(options.out, seeds, seeds[: options.nulls])
    if not options.summary and not fill(options.out, parts, partial(_finish, options.size)):
        return 0
    if missing(parts, is_summary=options.summary) and not options.summary:
        return 0
    _summarise(options.out, parts, options.size)
    return 0


def _options(argv: list[str], sizes: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.planted",
        description="Plant differences in models, and count which of them each method names. The "
        "same command resumes after a stop. Several processes with the same command share the "
        "work, and the one that ends last writes the tables.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/planted"), help="folder to write")
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds")
    parser.add_argument(
        "--first-seed", type=int, default=1, help="first seed; seed 0 is the pilot, see README"
    )
    parser.add_argument("--nulls", type=int, default=4, help="seeds with a null, from the first")
    parser.add_argument("--size", choices=sizes, default="full", help="small: for tests")
    parser.add_argument(
        "--summary", action="store_true", help="only write the tables, of what is measured"
    )
    options = parser.parse_args(argv)
    for name, least in (("seeds", 1), ("first_seed", 0), ("nulls", 0)):
        if getattr(options, name) < least:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option}: expected {least} or more, got {getattr(options, name)}")
    return options


def _finish(size: str, part: Part, progress: Callable[..., None], stop: Event) -> None:
    """Make and measure a part.

    Raises:
        StoppedError: before it is finished.
    """
    from reproduce.parts import MEASURED, write
    from reproduce.planted.measure import measure
    from reproduce.planted.organisms import SIZES, Maker

    maker = Maker(part.folder, part.seed, part.role, SIZES[size], progress, stop)
    maker.make()
    say(f"{part.label}: units of every method")
    write(part.folder / MEASURED, measure(maker), indent=None)


def _summarise(out: Path, parts: Sequence[Part], size: str) -> None:
    """Judge the stored units of the parts that are measured; write and print the tables.

    Raises:
        UserError: no planted organism is measured.
    """
    from reproduce.parts import TABLES, write_results
    from reproduce.planted import judge
    from reproduce.planted.folder import RESULT, settings_of
    from reproduce.planted.measure import judge_of
    from reproduce.planted.organisms import SIZES
    from reproduce.planted.scores import Seed, summarise
    from reproduce.planted.tables import tables

    measured = {(part.seed, part.role): part.measured() for part in parts}
    seeds = [
        Seed(number, judge_of(number, SIZES[size]), planted, measured.get((number, "null")))
        for (number, role), planted in measured.items()
        if role == "planted" and planted is not None
    ]
    if not seeds:
        raise UserError(f"--out: {out} has no measured organism yet; leave out --summary")
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "settings": {
            "seeds": [seed.number for seed in seeds],
            "nulls": [seed.number for seed in seeds if seed.null is not None],
            **settings_of(size),
            "size": size,
            "vocabulary": seeds[0].judge.n_tokens,
            "judge": {
                name.lower(): getattr(judge, name)
                for name in ("CONTEXTS", "PROMOTED", "LEAST", "SHARE", "LEVEL")
            },
        },
        "versions": {name: version(name) for name in ("fastadapt", "torch", "transformers")},
        **summarise(seeds),
    }
    shown = tables(result)
    write_results(out, RESULT, result, shown)
    for table in shown:
        print(table.title)
        print_table(table.head, table.rows)
        print(f"{table.note}\n" if table.note else "")
    for name in (RESULT, TABLES):
        print(f"{name}: {(out / name).resolve()}")


if __name__ == "__main__":
    run(main)
