"""Compare recipes of training at equal L0: ``python -m reproduce.recipes``."""

from __future__ import annotations

import argparse
import subprocess
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadapt.cli.console import print_table, quiet_transformers
from fastadapt.errors import UserError
from reproduce.command import run

if TYPE_CHECKING:
    from reproduce.recipes.catalogue import Catalogue
    from reproduce.recipes.folder import Part

SCHEMA_VERSION = 1


def main(argv: list[str]) -> int:
    """Train and measure the recipes, or resume; return the exit code."""
    import torch

    from reproduce.parts import fill, missing
    from reproduce.recipes.catalogue import check_present, chosen, read_catalogue
    from reproduce.recipes.folder import finish, open_folder, parts_of
    from reproduce.recipes.removed import record

    options = _options(argv)
    catalogue = read_catalogue(options.catalogue)
    names = [recipe["name"] for recipe in catalogue["recipes"]]
    pairs = chosen(options.pairs, list(catalogue["pairs"]), "--pairs")
    recipes = chosen(options.recipes, names, "--recipes")
    check_present({name: catalogue["pairs"][name] for name in pairs})
    quiet_transformers()
    torch.set_num_threads(1)  # as the runs; equal bits need equal threads
    is_summary = options.summary or options.record is not None
    parts = parts_of(options.out, catalogue, pairs, recipes, options.seeds)
    for part in parts:
        part.check()
    open_folder(options.out, is_new=not is_summary, pairs=list(catalogue["pairs"]))
    if not is_summary and not fill(options.out, parts, partial(finish, _commit())):
        return 0
    if missing(parts, is_summary=is_summary) and not is_summary:
        return 0
    shown = parts_of(options.out, catalogue, pairs, names, options.seeds)
    if options.record is not None:
        (name,) = chosen([options.record], names, "--record")
        record(options.removed, [part for part in shown if part.recipe["name"] == name])
    _summarise(options, catalogue, shown)
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    from reproduce.recipes.catalogue import CATALOGUE
    from reproduce.recipes.removed import REMOVED

    parser = argparse.ArgumentParser(
        prog="python -m reproduce.recipes",
        description="Train recipes with several sparsities and seeds, and compare them at equal "
        "L0. The same command resumes after a stop. Several processes with the same command share "
        "the work, and the one that ends last writes the tables.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder to write")
    parser.add_argument("--pairs", nargs="+", metavar="PAIR", help="default: all")
    parser.add_argument("--recipes", nargs="+", metavar="RECIPE", help="to run; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 1")
    parser.add_argument("--catalogue", type=Path, default=CATALOGUE, help="list of recipes")
    parser.add_argument("--removed", type=Path, default=REMOVED, help="results of removed recipes")
    parser.add_argument("--page", type=Path, help="Markdown page to write, such as docs/recipes.md")
    parser.add_argument(
        "--record",
        metavar="RECIPE",
        help="add the results of a recipe to --removed, before its option is removed",
    )
    parser.add_argument(
        "--summary", action="store_true", help="only write the tables, of what is measured"
    )
    options = parser.parse_args(argv)
    if options.seeds < 1:
        raise UserError(f"--seeds: expected 1 or more, got {options.seeds}")
    return options


def _commit() -> str | None:
    """Return the commit of this checkout; None without one."""
    root = Path(__file__).parents[2]
    try:
        got = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return got.stdout.strip()


def _summarise(options: argparse.Namespace, catalogue: Catalogue, parts: list[Part]) -> None:
    """Write and print the tables of the parts that are measured, and of removed recipes.

    Raises:
        UserError: no part is measured.
    """
    from fastadapt.io.atomic import disk_errors, make_folder, replacing
    from fastadapt.reporting.rendering import write_png, write_svg
    from reproduce.parts import TABLES, held, write_results, write_text
    from reproduce.recipes.folder import RESULT
    from reproduce.recipes.removed import read_removed
    from reproduce.recipes.results import gather, summarise
    from reproduce.recipes.tables import figures, page, tables

    measured = [(part, part.measured()) for part in parts]
    removed = read_removed(options.removed)
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "versions": {name: version(name) for name in ("fastadapt", "torch", "transformers")},
        "pairs": {},
    }
    for name in dict.fromkeys(part.pair for part in parts):
        pair = catalogue["pairs"][name]
        ours = {
            (part.recipe["name"], part.value, part.seed): each
            for part, each in measured
            if part.pair == name and each is not None
        }
        runs = gather(catalogue["recipes"], name, ours)
        shared = {each["shared"] for each in ours.values()}
        runs += removed.runs(name, shared, [recipe["name"] for recipe in catalogue["recipes"]])
        have = {each.recipe["name"] for each in runs}
        result["pairs"][name] = {
            "config": pair["config"],
            "settings": pair["settings"],
            "unmeasured": [
                recipe["name"]
                for recipe in catalogue["recipes"]
                if recipe["values"].get(name) and recipe["name"] not in have
            ],
            **summarise(pair, runs),
        }
    if not any(pair["recipes"] for pair in result["pairs"].values()):
        raise UserError(f"--out: {options.out} has no recipe with all of its values measured yet")
    written = tables(result)
    write_results(options.out, RESULT, result, written)
    drawn = figures(result)
    folders = [options.out]
    if options.page is not None:
        folders.append(options.page.with_suffix(""))
    for folder in folders:
        with held(options.out), disk_errors(folder):
            make_folder(folder)
            for figure in drawn:
                for write, suffix in ((write_png, "png"), (write_svg, "svg")):
                    with replacing(folder / f"{figure.key}.{suffix}") as staged:
                        write(figure, staged)
    for table in written:
        print(table.title)
        print_table(table.head, table.rows)
        print(f"{table.note}\n" if table.note else "")
    if options.page is not None:
        pictures = {figure.key: f"{folders[-1].name}/{figure.key}.png" for figure in drawn}
        write_text(options.page, page(result, pictures, "python -m reproduce.recipes"))
        print(f"page: {options.page.resolve()}")
    for name in (RESULT, TABLES):
        print(f"{name}: {(options.out / name).resolve()}")


if __name__ == "__main__":
    run(main)
