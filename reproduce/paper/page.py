"""Write the page of claims from the files of evaluations, contrasts and studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastadapt.errors import UserError
from fastadapt.evaluation.contrast.result import ContrastFile
from fastadapt.evaluation.result_schema import (
    BenchmarksPart,
    OutputsPart,
    PartialPart,
    check_sections,
)
from fastadapt.io.documents import check, read_json
from fastadapt.io.names import has_file
from fastadapt.reporting.tables import Table, as_markdown
from reproduce.paper.claims import CLAIMS, FULL, NOT_RUN, Claim, Source

_NAMES: Mapping[Source, str] = {
    "eval": "eval.json",
    "contrast": "contrast.json",
    "study": "study.json",
    "shares": "shares.json",
}
_PARTS = {"faithfulness": OutputsPart, "partial": PartialPart, "benchmarks": BenchmarksPart}

_HEAD = """# The paper's claims

What arXiv 2602.20904 claims of its 7B pair, and what the embedded pair of small models shows of it.
The page is written by `python -m reproduce.paper RUNS... --out docs/paper.md` from the files that
the commands write; only the numbers of the paper are typed.

Holds: `yes` or `no` by the estimate, `not clearly` if the interval contains the bound, or for
claims of equality if the intervals meet; `needs full scale` for what the embedded pair cannot show.
Intervals are 95%, over texts or questions, and over training seeds where a row compares groups of
runs ([evaluation](evaluation.md)). RUN is a run of the embedded pair with three sets of features:
`hesitation` of `fastadapt features select RUN --hesitation --top 1 --alive`, `template` of
`--template --alive`, and `both`, their union. So a feature of hesitation promotes a word of
hesitation most. The default of the option, and the paper's criterion, is a word among the ten most
promoted tokens; rows about the paper's selection say so.

"""


def find(folders: Sequence[Path]) -> dict[Source, Path]:
    """Return the file of each kind in the folders, or where the commands write it by default.

    A file of an evaluation is FOLDER/eval.json or FOLDER/eval/eval.json, and so for the others.
    Runs inside a folder have files of their own, which do not count.

    Raises:
        UserError: a folder does not exist, holds no such file, or there are several of a kind.
    """
    files: dict[Source, list[Path]] = {source: [] for source in _NAMES}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: expected a folder with results, got none")
        inside = {
            source: [path for path in (folder / name, folder / source / name) if has_file(path)]
            for source, name in _NAMES.items()
        }
        if not any(inside.values()):
            raise UserError(f"{folder}: expected one of {', '.join(_NAMES.values())}, got none")
        for source, paths in inside.items():
            files[source] += [path for path in paths if path not in files[source]]
    for source, paths in files.items():
        if len(paths) > 1:
            listed = ", ".join(map(str, paths))
            raise UserError(f"expected one {_NAMES[source]}, got {listed}; give narrower folders")
    return {source: paths[0] for source, paths in files.items() if paths}


def read(source: Source, path: Path) -> dict[str, Any]:
    """Read and check a file of results.

    Raises:
        UserError: the file is damaged.
    """
    result: dict[str, Any] = read_json(path, dict[str, Any])
    if source == "contrast":
        check(result, ContrastFile, str(path))
    if source == "eval":
        for section, schema in _PARTS.items():
            if section in result:
                held = {name: result[name] for name in schema.__annotations__ if name in result}
                check_sections(held, schema, str(path))
    return result


def page(results: Mapping[Source, Mapping[str, Any]], names: Mapping[Source, str]) -> str:
    """Return the page as Markdown.

    Args:
        results: contents of the files by kind.
        names: how the page names the files.
    """
    head = ["claim", "section", "in the paper", "here", "holds", "command"]
    claims = [claim for claim in CLAIMS if claim.section]
    controls = [claim for claim in CLAIMS if not claim.section]
    tables = [
        Table("Claims", head, [_row(claim, results) for claim in claims]),
        Table(
            "Controls that the paper does not have",
            ["control", "here", "holds", "command"],
            [[cells[0], *cells[3:]] for cells in (_row(claim, results) for claim in controls)],
        ),
    ]
    read_from = [f"- `{_NAMES[source]}`: {names[source]}\n" for source in _NAMES if source in names]
    missing = [_NAMES[source] for source in _NAMES if source not in names]
    files = "".join(read_from) + (f"- not given: {', '.join(missing)}\n" if missing else "")
    return f"{_HEAD}{as_markdown(tables)}\n## Files\n\n{files}"


def _row(claim: Claim, results: Mapping[Source, Mapping[str, Any]]) -> list[str]:
    value, holds = NOT_RUN, FULL
    if claim.source is not None:
        value, holds = claim.without, "–"
        if claim.source in results and claim.measure is not None:
            finding = claim.measure(results[claim.source])
            value, holds = finding if finding is not None else (NOT_RUN, "–")
    place = claim.section or "–"
    return [claim.text, place, claim.paper or "–", value, holds, f"`{claim.command}`"]
