"""Write the page of claims: ``python -m reproduce.paper RUNS... --out docs/paper.md``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastadapt.io.atomic import disk_errors, replacing
from reproduce.command import run
from reproduce.paper.page import find, page, read


def main(argv: list[str]) -> int:
    """Write the page, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.paper",
        description="Compare what the paper claims with what the files of results show.",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="folders with eval.json, contrast.json, study.json or shares.json, or a run with "
        "eval/eval.json and so on; without, nothing was run",
    )
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args(argv)
    files = find(options.folders)
    results = {source: read(source, path) for source, path in files.items()}
    text = page(results, {source: path.as_posix() for source, path in files.items()})
    with disk_errors(options.out, ""), replacing(options.out) as staged:
        staged.write_text(text, encoding="utf-8")
    print(options.out)
    return 0


if __name__ == "__main__":
    run(main)
